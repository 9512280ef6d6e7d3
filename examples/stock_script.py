"""A script that runs stock LLaVA. `swapped_script.py` is the same script with compression: two lines differ."""

import sys

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


if len(sys.argv) != 2:
    sys.exit("Usage: python SCRIPT REPO, from the root of the repository")
repo = sys.argv[1]
model = AutoModelForImageTextToText.from_pretrained(repo)
processor = AutoProcessor.from_pretrained(repo)

image = Image.open("demo/scene.png")
prompt = "USER: <image>\nWhat word is under the lemon? ASSISTANT:"
inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device, dtype=model.dtype)
answer = model.generate(**inputs, max_new_tokens=16)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
