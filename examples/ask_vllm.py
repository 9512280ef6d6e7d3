"""Ask a vLLM server several questions about a picture at once, with OpenAI's client.

    make serve                                # in one terminal: the embedded checkpoint on this machine's CPU
    python examples/ask_vllm.py               # in another

The request is an ordinary one: the plugin finds the question in it. See docs/vllm.md.
"""

import argparse
import asyncio
import base64
import sys
from pathlib import Path

from PIL import Image
from tqdm.asyncio import tqdm


try:
    from openai import APIConnectionError, AsyncOpenAI
except ImportError:
    sys.exit("This needs OpenAI's client: pip install openai")

QUESTIONS = [
    "What word is under the lemon?",
    "What color is the plate of the penguin?",
    "Where is the cactus?",
    "How many pictures of a whale are there?",
    "Is there an airplane in the picture?",
]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", default=QUESTIONS, help="by default five about demo/scene.png")
    parser.add_argument("--picture", type=Path, default=Path("demo/scene.png"))
    parser.add_argument("--server", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--budget", type=int, help="visual tokens; the server must run with --trust-request-mm-kwargs")
    parser.add_argument("--adaptive", metavar="REPO", help="recover here with this repo, as many tokens as it takes")
    options = parser.parse_args()

    if not options.picture.is_file():
        sys.exit(f"Run this from the root of the repository, or name a picture: there is no {options.picture} here.")
    client = AsyncOpenAI(base_url=options.server, api_key="none")
    try:
        model = (await client.models.list()).data[0].id
    except APIConnectionError:
        sys.exit(f"No server answers at {options.server}. Start one in another terminal: make serve")
    picture = base64.b64encode(options.picture.read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
    extra = {} if options.budget is None else {"mm_processor_kwargs": {"visual_token_budget": options.budget}}

    if options.adaptive:
        from vllm_plugin.image_embeds import ImageEmbedder, image_embeds_part

        embedder = ImageEmbedder(options.adaptive)
        with Image.open(options.picture) as opened:
            opened.load()

    async def ask(question: str) -> str:
        part = image_embeds_part(embedder(opened, question)) if options.adaptive else image
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": [part, {"type": "text", "text": question}]}],
            temperature=0,
            max_tokens=64,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        )
        answer, prompt_tokens = "", 0
        async for chunk in stream:  # as the tokens come
            answer += "".join(choice.delta.content or "" for choice in chunk.choices)
            prompt_tokens = chunk.usage.prompt_tokens if chunk.usage else prompt_tokens
        return f"{question}  {answer.strip()}  ({prompt_tokens} prompt tokens)"

    answers = await tqdm.gather(*map(ask, options.questions), desc="questions")
    print("\n".join(answers))


if __name__ == "__main__":
    asyncio.run(main())
