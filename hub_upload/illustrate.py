"""Puts a picture of what the model keeps, and the counts that belong to it, into a built folder's card."""

from __future__ import annotations

import shlex
from pathlib import Path

from hub_upload.checkpoint import file_sha256, read_json, write_json
from hub_upload.inspection import CONFIG
from hub_upload.model_card import with_illustration
from hub_upload.provenance import CARD, OVERLAY, PROVENANCE, read_provenance


def illustrate(folder: str | Path, image: str | Path, question: str) -> Path:
    """Runs both towers of the model in `folder`, not its language model, on a picture; returns the overlay's path."""
    import torch
    from PIL import Image

    from recoverable_llava.tools.families import family_of
    from recoverable_llava.tools.visualize import draw_recovery

    folder = Path(folder)
    provenance = read_provenance(folder)
    if not Path(image).is_file():
        raise ValueError(f"image={str(image)!r} does not exist: pass a picture file")
    picture = Image.open(image).convert("RGB")
    family = family_of(str(read_json(folder / CONFIG).get("model_type")))
    model = family.model_class.from_pretrained(folder, dtype="auto").eval()
    processor = family.processor_class.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=picture, text=prompt, return_tensors="pt").to(model.dtype)
    with torch.no_grad():
        recovery = model.recover_tokens(**inputs)
    selection = recovery.selection
    kept = {
        "kept by vision": int(selection.num_visual.sum()),
        "recovered for the question": int(selection.num_text.sum()),
        "merged": int(selection.num_merged.sum()),
    }
    draw_recovery(picture, recovery).save(folder / OVERLAY)
    command = (
        f"python -m hub_upload illustrate {folder.name} --image {Path(image).name} --question {shlex.quote(question)}"
    )
    card = (folder / CARD).read_text(encoding="utf-8")
    (num_uncompressed,) = recovery.num_uncompressed
    (folder / CARD).write_text(with_illustration(card, question, kept, num_uncompressed, command), encoding="utf-8")
    provenance["files"][OVERLAY] = file_sha256(folder / OVERLAY)
    write_json(folder / PROVENANCE, provenance)
    return folder / OVERLAY
