"""Chat about a picture in the terminal: every answer appears word by word. An empty line or the end of input ends it.

Each question recovers its own patches: the whole conversation is given again, and its last question guides.
"""

import sys
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer


def asked() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


if not Path("demo/scene.png").is_file():
    sys.exit("Run this from the root of the repository: it asks about demo/scene.png.")
repo = sys.argv[1] if len(sys.argv) > 1 else "checkpoints/tiny"
model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)

picture = {"type": "image", "image": Image.open("demo/scene.png")}
messages = []
while question := asked():
    text = {"type": "text", "text": question}
    messages.append({"role": "user", "content": [text] if messages else [picture, text]})
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device, dtype=model.dtype)
    ids = model.generate(**inputs, max_new_tokens=64, streamer=streamer)
    answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
