"""Ask a server about a picture with OpenAI's client, streaming. Start the server first, in another terminal:

pip install "transformers[serving]" openai
transformers serve checkpoints/tiny --trust-remote-code
"""

import base64
import sys
from pathlib import Path


try:
    from openai import APIConnectionError, OpenAI
except ImportError:
    sys.exit('This needs OpenAI\'s client: pip install "transformers[serving]" openai')
if not Path("demo/scene.png").is_file():
    sys.exit("Run this from the root of the repository: it asks about demo/scene.png.")
repo = sys.argv[1] if len(sys.argv) > 1 else "checkpoints/tiny"
address = sys.argv[2] if len(sys.argv) > 2 else "http://localhost:8000/v1"
client = OpenAI(base_url=address, api_key="none")

picture = base64.b64encode(Path("demo/scene.png").read_bytes()).decode()
content = [
    {"type": "text", "text": "What word is under the lemon?"},
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
]
try:
    chunks = client.chat.completions.create(
        model=repo, messages=[{"role": "user", "content": content}], max_tokens=16, stream=True
    )
except APIConnectionError:
    sys.exit(
        f"No server answers at {address}. Start one in another terminal: transformers serve {repo} --trust-remote-code"
    )
for chunk in chunks:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
