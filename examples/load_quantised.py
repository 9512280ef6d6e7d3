"""Load the language model in 4 bits with bitsandbytes. Both towers stay as they are: they choose the visual tokens.

Needs `pip install bitsandbytes`; runs on a GPU, and with recent versions on a CPU.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig


if find_spec("bitsandbytes") is None:
    sys.exit("This needs bitsandbytes: pip install bitsandbytes")
if not Path("demo/scene.png").is_file():
    sys.exit("Run this from the root of the repository: it asks about demo/scene.png.")
repo = sys.argv[1] if len(sys.argv) > 1 else "checkpoints/tiny"
quantisation = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.bfloat16,
    llm_int8_skip_modules=["model.vision_tower", "model.question_tower", "model.visual_projection", "lm_head"],
)
model = AutoModelForImageTextToText.from_pretrained(
    repo, trust_remote_code=True, quantization_config=quantisation, dtype=torch.bfloat16, device_map="auto"
)
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)

prompt = "USER: <image>\nWhat word is under the lemon? ASSISTANT:"
inputs = processor(images=Image.open("demo/scene.png"), text=prompt, return_tensors="pt")
inputs = inputs.to(model.device, dtype=torch.bfloat16)
answer = model.generate(**inputs, max_new_tokens=16)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
print(f"{model.get_memory_footprint() / 1e6:.1f} MB of weights")
