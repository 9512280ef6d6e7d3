"""Many questions about one picture: the vision tower runs once, each question still recovers its own patches."""

import sys
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


if not Path("demo/scene.png").is_file():
    sys.exit("Run this from the root of the repository: it asks about demo/scene.png.")
repo = sys.argv[1] if len(sys.argv) > 1 else "checkpoints/tiny"
model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
image = Image.open("demo/scene.png")

vision_features = None
for question in ("What word is under the lemon?", "Where is the cactus?", "How many pictures of a whale are there?"):
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device, dtype=model.dtype)
    pixel_values = inputs.pop("pixel_values")
    if vision_features is None:  # LLaVA-NeXT has image_sizes
        vision_features = model.get_vision_features(pixel_values, image_sizes=inputs.get("image_sizes"))
    ids = model.generate(**inputs, vision_features=vision_features, max_new_tokens=16)
    num_tokens = int(model.recover_tokens(**inputs, vision_features=vision_features).selection.num_tokens)
    answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{question} {answer.strip()} ({num_tokens} visual tokens)")
