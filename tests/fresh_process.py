"""What `test_remote_code` runs in a process of its own: a user's script that has a repo folder and transformers only.

    python -I fresh_process.py NAME FOLDER REPORT [ARGUMENT ...]

runs the function NAME and writes what it returns to the file REPORT. The package must not be importable here, so
importing it is an error; so is any network connection.
"""

import hashlib
import json
import socket
import sys
from pathlib import Path
from typing import Any


class Barrier:
    """An import hook that stands for a machine where recoverable_llava is not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == "recoverable_llava":
            raise ModuleNotFoundError(f"{name} is not installed here")


def no_network(*_: Any) -> None:
    raise OSError("this process must not connect to anything")


def isolate() -> None:
    """Only in a process of its own: tests import this file, too."""
    sys.meta_path.insert(0, Barrier())
    socket.socket.connect = no_network  # type: ignore[method-assign, assignment]


QUESTIONS = ["what is the colour of the cat ?", "why ?", "how many dog are there ?"]
SETTINGS = {"max_new_tokens": 6, "do_sample": False}


def pictures() -> list[Any]:
    from PIL import Image

    flat = [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.linear_gradient("L").rotate(90)]
    square = [Image.merge("RGB", (flat[i], flat[(i + 1) % 3], flat[(i + 2) % 3])) for i in range(3)]
    return [square[0], square[1].resize((300, 100)), square[2]]  # of several numbers of tiles


def prompts() -> list[str]:
    return [f"USER: <image>\n{question} ASSISTANT:" for question in QUESTIONS]


def chats() -> list[Any]:
    return [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
        for image, question in zip(pictures(), QUESTIONS)
    ]


def weights_digest(model: Any) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode() + weight.contiguous().numpy().tobytes())
    return digest.hexdigest()


def batch_answers(model: Any, processor: Any) -> list[str]:
    images = [[image] for image in pictures()]
    inputs = processor(images=images, text=prompts(), padding=True, return_tensors="pt")
    sequences = model.generate(**inputs, **SETTINGS)
    return processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def auto_classes(folder: str) -> dict[str, Any]:
    """Every Auto class, what it loads, and the answers of a batch."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoProcessor

    report: dict[str, Any] = {"AutoConfig": type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__}
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    report["AutoProcessor"] = type(processor).__name__
    for name in ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"):
        model, info = getattr(transformers, name).from_pretrained(
            folder, trust_remote_code=True, output_loading_info=True
        )
        report[name] = type(model).__name__
        report[f"{name} loading info"] = {key: sorted(map(str, value)) for key, value in info.items() if value}
        report[f"{name} module"] = type(model).__module__
        if name != "AutoModel":
            report[f"{name} answers"] = batch_answers(model, processor)
    inputs = processor(images=pictures()[0], text=prompts()[0], return_tensors="pt")
    with torch.no_grad():
        report["logits"] = model(**inputs).logits[0, -1].tolist()
        report["num_tokens"] = model.recover_tokens(**inputs).selection.num_tokens.tolist()
        model.config.compress = False
        report["uncompressed logits"] = model(**inputs).logits[0, -1].tolist()
    # pip's finder of an editable install is loaded at start-up, whatever is imported.
    loaded = [name for name in sys.modules if not name.startswith("__editable__")]
    report["modules"] = sorted(name for name in loaded if "recoverable_llava" in name)
    return report


def pipelines(folder: str) -> dict[str, Any]:
    """Every way to call the pipeline."""
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    prefill: list[int] = []

    def record(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["inputs_embeds"].shape[1] > 1:
            prefill.append(kwargs["inputs_embeds"].shape[1])

    pipe.model.model.language_model.register_forward_pre_hook(record, with_kwargs=True)
    images, texts = pictures(), prompts()

    def texts_of(outputs: Any) -> Any:
        if isinstance(outputs, list):
            return [texts_of(output) for output in outputs]
        return outputs["generated_text"]

    settings = {"generate_kwargs": SETTINGS}
    report: dict[str, Any] = {
        "model": type(pipe.model).__name__,
        "processor": type(pipe.processor).__name__,
        "string": texts_of(pipe(images=images[0], text=texts[0], return_full_text=False, **settings)),
        "string prefill": list(prefill),
        "string in full": texts_of(pipe(images=images[0], text=texts[0], return_full_text=True, **settings)),
        "list": texts_of(pipe(images=[[image] for image in images], text=texts, return_full_text=False, **settings)),
        "chat": texts_of(pipe(text=chats()[0], return_full_text=False, **settings)),
        "chat in full": texts_of(pipe(text=chats()[0], return_full_text=True, **settings)),
        "chats": texts_of(pipe(text=chats(), return_full_text=False, **settings)),
        "chats by twos": texts_of(pipe(text=chats(), batch_size=2, return_full_text=False, **settings)),
    }
    for chat in report["chat in full"]:
        if isinstance(chat, list):
            for message in chat:
                if not isinstance(message["content"], str):
                    message["content"] = [part["type"] for part in message["content"]]
    return report


def without_trust(folder: str) -> dict[str, str]:
    """The error of each way in, without trust_remote_code."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

    ways = {
        "AutoConfig": lambda: AutoConfig.from_pretrained(folder),
        "AutoModelForImageTextToText": lambda: AutoModelForImageTextToText.from_pretrained(folder),
        "AutoProcessor": lambda: AutoProcessor.from_pretrained(folder),
        "pipeline": lambda: pipeline("image-text-to-text", model=folder),
    }
    report = {}
    for name, way in ways.items():
        try:
            way()
            report[name] = "no error"
        except Exception as error:
            report[name] = f"{type(error).__name__}: {error}"
    return report


def save_twice(folder: str, first: str, second: str) -> dict[str, Any]:
    """Load, save, load what was saved, save again."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    digests, answers = [], []
    for source, target in ((folder, first), (first, second)):
        model, info = AutoModelForImageTextToText.from_pretrained(
            source, trust_remote_code=True, output_loading_info=True
        )
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
        model.save_pretrained(target)
        processor.save_pretrained(target)
        digests.append(weights_digest(model))
        answers.append(batch_answers(model, processor))
        assert not any(info.values()), info
    return {"weights": digests, "answers": answers}


def offloaded(folder: str, offload_folder: str) -> dict[str, Any]:
    """Answers with device_map="auto" and with towers and language model on disk."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    auto = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, device_map="auto")
    parts = {"model.multi_modal_projector": "cpu", "model.visual_projection": "cpu", "lm_head": "cpu"}
    if hasattr(auto.model, "image_newline"):
        parts["model.image_newline"] = "cpu"
    for name in ("model.vision_tower", "model.language_model", "model.question_tower"):
        parts[name] = "disk"
    disk = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, device_map=parts, offload_folder=offload_folder
    )
    return {
        "auto": batch_answers(auto, processor),
        "disk": batch_answers(disk, processor),
        "on meta": sorted({name.split(".")[1] for name, weight in disk.named_parameters() if weight.is_meta}),
    }


if __name__ == "__main__":
    isolate()
    function, folder, report_file, *arguments = sys.argv[1:]
    result = globals()[function](folder, *arguments)
    assert not any(name.split(".")[0] == "recoverable_llava" for name in sys.modules)
    Path(report_file).write_text(json.dumps(result), encoding="utf-8")
