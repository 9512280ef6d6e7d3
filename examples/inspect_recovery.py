"""Which patches a question keeps, in numbers and as a picture: recovery.png. The language model does not run."""

import sys
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from recoverable_llava.tools.visualize import draw_questions


if not Path("demo/scene.png").is_file():
    sys.exit("Run this from the root of the repository: it asks about demo/scene.png.")
repo = sys.argv[1] if len(sys.argv) > 1 else "checkpoints/tiny"
model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
image = Image.open("demo/scene.png")

recoveries = {}
for question in ("What word is under the lemon?", "Where is the cactus?"):
    inputs = processor(images=image, text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt")
    recoveries[question] = model.recover_tokens(**inputs.to(model.device, dtype=model.dtype))
    selection, (num_uncompressed,) = recoveries[question].selection, recoveries[question].num_uncompressed
    print(
        f"{question} {int(selection.num_tokens)} of {num_uncompressed} visual tokens: "
        f"{int(selection.num_visual)} kept by vision, {int(selection.num_text)} recovered for the question, "
        f"{int(selection.num_merged)} merged"
    )
draw_questions(image, recoveries).save("recovery.png")
