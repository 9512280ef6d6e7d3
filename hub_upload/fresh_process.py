"""Runs in a process of its own, as a user's script would: loads a repository with its remote code and reports as JSON.

Called by `verify` with one JSON argument; imports nothing of this package, so that what loads is what the repository
holds.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any


# By name, as the library would hand a file of some others to a program.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def executed_files() -> dict[str, str]:
    """SHA-256 of every remote-code file that this process imported."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("transformers_modules.")]
    paths = {Path(file) for module in modules if (file := getattr(module, "__file__", None))}
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.name != "__init__.py"}


def loading_problems(info: dict[str, Any]) -> dict[str, Any]:
    return {name: sorted(map(str, value)) for name, value in info.items() if value}


def picture(path: str | None, size: int) -> Any:
    from PIL import Image, ImageOps

    if path:
        return ImageOps.exif_transpose(Image.open(path, formats=PICTURE_FORMATS)).convert("RGB")
    horizontal = Image.linear_gradient("L").resize((size, size))
    return Image.merge("RGB", (horizontal, horizontal.rotate(90), Image.radial_gradient("L").resize((size, size))))


def check(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    import transformers
    from transformers import AutoProcessor

    device = request["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    where = {"revision": request["revision"]} if request["revision"] else {}
    report: dict[str, Any] = {"device": device}
    model_class: Any = transformers.AutoModelForImageTextToText
    model, info = model_class.from_pretrained(
        request["target"], trust_remote_code=True, dtype="auto", output_loading_info=True, **where
    )
    report["loading_problems"] = loading_problems(info)
    report["module"] = type(model).__module__
    model = model.to(device).eval()
    processor = AutoProcessor.from_pretrained(request["target"], trust_remote_code=True, **where)
    report["processor_module"] = type(processor).__module__

    image = picture(request["image"], model.config.vision_config.image_size)
    content = [{"type": "image"}, {"type": "text", "text": request["question"]}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt").to(device, model.dtype)
    with torch.no_grad():
        generated = model.generate(**inputs, max_new_tokens=request["max_new_tokens"], do_sample=False)
        selection = model.recover_tokens(**inputs).selection
    report["executed_files"] = executed_files()
    report["answer"] = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    report["new_tokens"] = generated.shape[1] - inputs["input_ids"].shape[1]
    report["tokens"] = int(selection.num_tokens.sum())

    stock_processor = getattr(transformers, type(processor).__name__.removeprefix("Recoverable"))(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        image_token=processor.image_token,
        num_additional_image_tokens=processor.num_additional_image_tokens,
    )
    stock_inputs = stock_processor(images=image, text=prompt, return_tensors="pt").to(device, model.dtype)
    num_placeholders = int((stock_inputs["input_ids"] == model.config.image_token_id).sum())
    report["of_tokens"] = num_placeholders - model.config.num_class_tokens
    model.config.compress = False
    with torch.no_grad():
        uncompressed = model(**stock_inputs).logits.float().cpu()
    del model
    gc.collect()
    stock, info = model_class.from_pretrained(request["stock"], dtype="auto", output_loading_info=True)
    report["stock_loading_problems"] = loading_problems(info)
    with torch.no_grad():
        expected = stock.to(device).eval()(**stock_inputs).logits.float().cpu()
    report["largest_difference"] = float((uncompressed - expected).abs().max())
    report["finite"] = bool(torch.isfinite(expected).all())
    return report


def main() -> None:
    request = json.loads(sys.argv[1])
    try:
        report = check(request)
    except Exception:
        report = {"error": traceback.format_exc(limit=-4)}
    Path(request["report"]).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main()
