"""Ask a model about pictures and see what compression did: what the command line, the demo and the app have in common.

Loads with the classes of this package, so no code of a checkpoint is ever run, and from safetensors alone.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor

from recoverable_llava.recoverable_vision import Recovery, VisionFeatures
from recoverable_llava.recovery_settings import PRESETS, RecoverySettingsMixin
from recoverable_llava.tools.families import family_of
from recoverable_llava.tools.settings import configured


# The value of `picture_domain` in the config of a checkpoint that knows no photos.
DRAWN_SCENES = "drawn scenes"


@dataclass(frozen=True)
class Answer:
    """An answer, and what it took."""

    text: str
    num_tokens: int  # visual tokens that the language model read
    num_uncompressed: int  # of how many
    seconds: float
    recovery: Recovery | None  # None without compression


def read_config(repo: str) -> Any:
    """The config of a folder or Hub repo.

    Raises:
        ValueError: naming what is wrong with `repo`, and what to do.
    """
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
    if not isinstance(config, RecoverySettingsMixin):
        raise ValueError(
            f"{repo!r} is a {config.model_type!r} checkpoint without recoverable compression: build one from it with "
            "`recoverable-llava-upload build`, or name another."
        )
    return config


def load(repo: str, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """Model and processor of a folder or Hub repo of any family, in evaluation mode.

    The processor prepares whole prompts, also where the repo has a fixed budget: calls may ask for another one, or for
    no compression.

    Args:
        repo: folder or repo id.
        device: such as "cpu" or "cuda:0"; by default a GPU if there is one.
        dtype: such as "bfloat16"; by default the checkpoint's own on a GPU, and float32, its fastest, on a CPU.

    Raises:
        ValueError: naming what is wrong with `repo` or `device`, and what to do.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is none that torch knows: use cpu or cuda.") from error
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but there is no CUDA GPU here, or torch was built without CUDA: use cpu.")
    family = family_of(read_config(repo).model_type)
    dtype = dtype or ("auto" if device.startswith("cuda") else "float32")
    try:
        model = family.model_class.from_pretrained(repo, dtype=dtype, use_safetensors=True)
    except SafetensorError as error:
        raise ValueError(f"The weights of {repo!r} are damaged ({error}): get the checkpoint again.") from error
    processor = AutoProcessor.from_pretrained(repo)
    processor.visual_token_budget = None
    return model.to(device).eval(), processor


def sees_tiles(config: Any) -> bool:
    """Whether the model of a config sees all of a picture, in tiles, or else its centre square."""
    return hasattr(config, "image_grid_pinpoints")


def is_unfamiliar(config: Any, picture: Image.Image) -> bool:
    """Whether the checkpoint was made for drawn scenes alone, and the picture is not of their size.

    `training/` writes `picture_domain` into the config, and, where its scenes are not of the size of the vision tower,
    their `picture_sizes` (height, width).
    """
    side = config.vision_config.image_size
    sizes = getattr(config, "picture_sizes", None) or [(side, side)]
    is_of_their_size = (picture.height, picture.width) in map(tuple, sizes)
    return getattr(config, "picture_domain", None) == DRAWN_SCENES and not is_of_their_size


def user_turn(question: str, picture: Image.Image | None = None) -> dict[str, Any]:
    """One message of a user, for a chat template."""
    text = {"type": "text", "text": question}
    return {"role": "user", "content": [text] if picture is None else [{"type": "image", "image": picture}, text]}


def assistant_turn(answer: str) -> dict[str, Any]:
    """One message of the model, for a chat template."""
    return {"role": "assistant", "content": [{"type": "text", "text": answer}]}


@torch.inference_mode()
def ask(
    model: Any,
    processor: Any,
    messages: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int = 128,
    **config_settings: Any,
) -> Answer:
    """The answer to a conversation that ends with a user's turn.

    Args:
        processor: as `load` returns it.
        messages: turns as `user_turn` and `assistant_turn` make them.
        config_settings: fields of the config for this call alone, such as `compress=False` or `lof_threshold=2.0`.
    """
    inputs = _inputs(model, processor, messages)
    num_uncompressed = int((inputs["input_ids"] == model.config.image_token_id).sum())
    with configured(model.config, **config_settings):
        recovery = model.recover_tokens(**inputs) if model.config.compress and num_uncompressed else None
        started = time.perf_counter()
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        seconds = time.perf_counter() - started
    num_tokens = num_uncompressed
    if recovery is not None:
        kept = recovery.selection.num_tokens
        num_tokens = int(kept.sum()) + len(kept) * model.config.num_class_tokens
    return Answer(text, num_tokens, num_uncompressed, seconds, recovery)


@torch.inference_mode()
def recover(
    model: Any,
    processor: Any,
    messages: Sequence[dict[str, Any]],
    *,
    vision_features: VisionFeatures | None = None,
    **config_settings: Any,
) -> tuple[Recovery, VisionFeatures]:
    """What compression would keep for a conversation's last question, without running the language model.

    Args:
        vision_features: what an earlier call with the same picture and the same `text_relevance` returned: the vision
            tower, which takes nearly all of the time, does not run again then.

    Returns:
        The recovery, and the vision tower's features for the next call.
    """
    inputs = _inputs(model, processor, messages)
    pixel_values = inputs.pop("pixel_values")
    with configured(model.config, **config_settings):
        if vision_features is None:
            vision_features = model.get_vision_features(pixel_values, image_sizes=inputs.get("image_sizes"))
        return model.recover_tokens(**inputs, vision_features=vision_features), vision_features


def _inputs(model: Any, processor: Any, messages: Sequence[dict[str, Any]]) -> Any:
    inputs = processor.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return inputs.to(model.device, dtype=model.dtype)


def recovery_settings(
    config: Any,
    preset: str | None = None,
    threshold: float | None = None,
    budget: int | None = None,
) -> dict[str, Any]:
    """Fields of the config for three things that people want to change; None leaves one as it is.

    Args:
        preset: a name in `PRESETS`.
        threshold: what a patch must exceed to count, in either preset: higher keeps fewer tokens.
        budget: exactly so many tokens.

    Raises:
        ValueError: if a threshold is given beside a budget that leaves it nothing to decide.
    """
    fields: dict[str, Any] = dict(PRESETS[preset]) if preset else {}
    if threshold is not None:
        own = config.visual_token_budget if budget is None else budget
        if not uses_threshold(config, preset, own):
            raise ValueError(
                f"threshold={threshold} decides nothing where the budget is {own}: leave the threshold out."
            )
        fields[threshold_field(config, preset)] = threshold
    if budget is not None:
        fields["visual_token_budget"] = budget
    return fields


def threshold_field(config: Any, preset: str | None = None) -> str:
    """The field of the config that is a preset's threshold."""
    selection = PRESETS[preset]["selection"] if preset else config.selection
    return "novelty_threshold" if selection == "novelty" else "lof_threshold"


def uses_threshold(config: Any, preset: str | None = None, budget: int | None = None) -> bool:
    """Whether the threshold decides anything: under a budget, the default takes the most novel patches whatever it is,
    while the paper's selection shares the budget among the kinds of tokens as many as the threshold counts of each.
    """
    return budget is None or threshold_field(config, preset) == "lof_threshold"
