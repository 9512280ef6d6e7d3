"""A second turn that goes on from the first one's KV cache: the picture is neither encoded nor read again.

The first question chose the visual tokens. Where the second asks about something else, give the whole conversation
again instead (`streaming_chat.py`), so that its own question chooses.
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


if not Path("demo/scene.png").is_file():
    sys.exit("Run this from the root of the repository: it asks about demo/scene.png.")
repo = sys.argv[1] if len(sys.argv) > 1 else "checkpoints/tiny"
model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)

prompt = "USER: <image>\nWhat color is the plate of the penguin? ASSISTANT:"
inputs = processor(images=Image.open("demo/scene.png"), text=prompt, return_tensors="pt").to(dtype=model.dtype)
first = model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True)
print(processor.decode(first.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

turn = processor.tokenizer(" USER: Where is the penguin? ASSISTANT:", add_special_tokens=False, return_tensors="pt")
ids = torch.cat([first.sequences, turn["input_ids"]], dim=1)
second = model.generate(input_ids=ids, past_key_values=first.past_key_values, max_new_tokens=8)
print(processor.decode(second[0, ids.shape[1] :], skip_special_tokens=True))
print(f"{ids.shape[1]} tokens of conversation, {first.past_key_values.get_seq_length()} of them in the cache now")
