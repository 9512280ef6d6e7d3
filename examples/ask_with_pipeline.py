"""Ask about a picture with `pipeline`: the usual call, with trust_remote_code=True."""

import sys
from pathlib import Path

from transformers import pipeline


if not Path("demo/scene.png").is_file():
    sys.exit("Run this from the root of the repository: it asks about demo/scene.png.")
answerer = pipeline(
    "image-text-to-text", model=sys.argv[1] if len(sys.argv) > 1 else "checkpoints/tiny", trust_remote_code=True
)
question = [{"type": "image", "url": "demo/scene.png"}, {"type": "text", "text": "What word is under the lemon?"}]
reply = answerer(text=[{"role": "user", "content": question}], max_new_tokens=16, return_full_text=False)
print(reply[0]["generated_text"])
