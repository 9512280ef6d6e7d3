"""Ask a model about pictures and see what compression did: what the command line, the demo and the app have in common.

Loads with the classes of this package, so no code of a checkpoint is ever run, and from safetensors alone.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers import AutoConfig, AutoProcessor

from recoverable_llava.configuration_recoverable_llava import RecoverableLlavaConfig
from recoverable_llava.modeling_recoverable_llava import RecoverableLlavaForConditionalGeneration, Recovery
from recoverable_llava.recovery_settings import PRESETS


@dataclass(frozen=True)
class Answer:
    """An answer, and what it took."""

    text: str
    num_tokens: int  # visual tokens that the language model read
    num_uncompressed: int  # of how many
    seconds: float
    recovery: Recovery | None  # None without compression


def load(
    repo: str, device: str | None = None, dtype: str | None = None
) -> tuple[RecoverableLlavaForConditionalGeneration, Any]:
    """Model and processor of a folder or Hub repo, in evaluation mode.

    Args:
        repo: folder or repo id.
        device: such as "cpu" or "cuda:0"; by default a GPU if there is one.
        dtype: such as "bfloat16"; by default the checkpoint's own on a GPU, and float32, its fastest, on a CPU.

    Raises:
        ValueError: naming what is wrong with `repo` or `device`, and what to do.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but there is no CUDA GPU here, or torch was built without CUDA: use cpu.")
    looks_like_path = Path(repo).is_absolute() or repo.startswith(".") or repo.count("/") != 1
    if looks_like_path and not Path(repo).is_dir():
        raise ValueError(
            f"There is no folder {repo!r}: pass a folder with a checkpoint, or a Hub repo id (owner/name)."
        )
    try:
        config = AutoConfig.from_pretrained(repo)
    except OSError as error:
        raise ValueError(
            f"{repo!r} is neither a folder with a checkpoint nor a Hub repo that can be read from here. Check the "
            f"name, the network, and for a private or gated repo `hf auth login`. ({str(error).splitlines()[0]})"
        ) from error
    except ValueError as error:  # a model type that transformers does not know
        raise ValueError(
            f"{repo!r} is not a LLaVA with recoverable compression. ({str(error).splitlines()[0]})"
        ) from error
    if not isinstance(config, RecoverableLlavaConfig):
        raise ValueError(
            f"{repo!r} is a {config.model_type!r} checkpoint without recoverable compression: build one from it with "
            "`recoverable-llava-upload build`, or name another."
        )
    model = RecoverableLlavaForConditionalGeneration.from_pretrained(
        repo, dtype=dtype or ("auto" if device.startswith("cuda") else "float32"), use_safetensors=True
    )
    return model.to(device).eval(), AutoProcessor.from_pretrained(repo)


def open_picture(path: str | Path) -> Image.Image:
    """A picture file as RGB, turned as its camera says.

    Raises:
        ValueError: if there is no such file, or it is no picture that can be read to the end.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}: pass a picture (JPEG, PNG, WebP, …).")
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(
            f"{str(path)!r} is no picture in a format that Pillow reads: convert it to JPEG or PNG."
        ) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r} cannot be read to the end as a picture ({error}): save it again.") from error


def user_turn(question: str, picture: Image.Image | None = None) -> dict[str, Any]:
    """One message of a user, for a chat template."""
    text = {"type": "text", "text": question}
    return {"role": "user", "content": [text] if picture is None else [{"type": "image", "image": picture}, text]}


def assistant_turn(answer: str) -> dict[str, Any]:
    """One message of the model, for a chat template."""
    return {"role": "assistant", "content": [{"type": "text", "text": answer}]}


@torch.inference_mode()
def ask(
    model: RecoverableLlavaForConditionalGeneration,
    processor: Any,
    messages: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int = 128,
    **config_settings: Any,
) -> Answer:
    """The answer to a conversation that ends with a user's turn.

    Args:
        messages: turns as `user_turn` and `assistant_turn` make them.
        config_settings: fields of the config for this call alone, such as `compress=False` or `lof_threshold=2.0`.
    """
    inputs = _inputs(model, processor, messages)
    per_image = model.config.num_patches + model.config.num_class_tokens
    num_images = len(inputs["pixel_values"]) if "pixel_values" in inputs else 0
    with settings(model, **config_settings):
        recovery = model.recover_tokens(**inputs) if model.config.compress and num_images else None
        started = time.perf_counter()
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        seconds = time.perf_counter() - started
    num_tokens = num_images * per_image
    if recovery is not None:
        num_tokens = int(recovery.selection.num_tokens.sum()) + num_images * model.config.num_class_tokens
    return Answer(text, num_tokens, num_images * per_image, seconds, recovery)


@torch.inference_mode()
def recover(
    model: RecoverableLlavaForConditionalGeneration,
    processor: Any,
    messages: Sequence[dict[str, Any]],
    **config_settings: Any,
) -> Recovery:
    """What compression would keep for a conversation's last question, without running the language model."""
    with settings(model, **config_settings):
        return model.recover_tokens(**_inputs(model, processor, messages))


def _inputs(model: Any, processor: Any, messages: Sequence[dict[str, Any]]) -> Any:
    inputs = processor.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return inputs.to(model.device, dtype=model.dtype)


def recovery_settings(
    config: RecoverableLlavaConfig,
    preset: str | None = None,
    threshold: float | None = None,
    budget: int | None = None,
) -> dict[str, Any]:
    """Fields of the config for three things that people want to change; None leaves one as it is.

    Args:
        preset: a name in `PRESETS`.
        threshold: what a patch must exceed to count, in either preset: higher keeps fewer tokens.
        budget: exactly so many tokens.
    """
    fields: dict[str, Any] = dict(PRESETS[preset]) if preset else {}
    if threshold is not None:
        by_novelty = fields.get("selection", config.selection) == "novelty"
        fields["novelty_threshold" if by_novelty else "lof_threshold"] = threshold
    if budget is not None:
        fields["visual_token_budget"] = budget
    return fields


@contextmanager
def settings(model: RecoverableLlavaForConditionalGeneration, **config_settings: Any) -> Iterator[None]:
    """Fields of the model's config changed for a while.

    Raises:
        ValueError: if the config has no such field, or its value is not allowed.
    """
    for name in config_settings:
        if not hasattr(model.config, name):
            raise ValueError(f"The config has no field {name!r}; see RecoverableLlavaConfig.")
    before = {name: getattr(model.config, name) for name in config_settings}
    try:
        for name, value in config_settings.items():
            setattr(model.config, name, value)
        model.config.validate_recovery()
        yield
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)
