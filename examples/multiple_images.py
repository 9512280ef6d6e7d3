"""Two pictures in one prompt. Each is compressed for itself, both for the one question."""

import sys
from pathlib import Path

from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor


if not Path("demo/scene.png").is_file():
    sys.exit("Run this from the root of the repository: it asks about demo/scene.png.")
repo = sys.argv[1] if len(sys.argv) > 1 else "checkpoints/tiny"
model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)

scene = Image.open("demo/scene.png").convert("RGB")
content = [
    {"type": "image", "image": scene},
    {"type": "image", "image": ImageOps.mirror(scene)},
    {"type": "text", "text": "Is there a penguin in the picture?"},
]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, dtype=model.dtype)
print("visual tokens of each picture:", model.recover_tokens(**inputs).selection.num_tokens.tolist())
answer = model.generate(**inputs, max_new_tokens=16)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
