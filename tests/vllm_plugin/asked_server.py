"""A server of this repository's settings and its client, and chats in the form that each side takes."""

import base64
import io
from pathlib import Path

import openai
from PIL import Image
from reference import MAX_TOKENS, REPO, Generated

from benchmarks.serving import Server


CONFIG = str(Path(__file__).parents[2] / "vllm_plugin" / "cpu_server.yaml")


class AskedServer(Server):
    """The server of `make serve`, and a client."""

    def __init__(self, folder: Path, *arguments: str, repo: str = REPO, **environment: str):
        arguments = ("--config", CONFIG, "--model", repo, *arguments)
        super().__init__(folder / "log", list(arguments), VLLM_LOGGING_LEVEL="DEBUG", **environment)
        http = openai.DefaultHttpxClient(trust_env=False)  # whatever proxy the environment names
        self.client = openai.OpenAI(
            base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=120, http_client=http
        )
        self.model = self.client.models.list().data[0].id

    def tower_passes(self) -> int:
        return self.log.read_text().count("The vision tower encodes")

    def ask(self, messages: list[dict], **options) -> Generated:
        """The greedy answer to a chat."""
        extra = options.pop("extra_body", {}) | {"return_tokens_as_token_ids": True}
        answer = self.client.chat.completions.create(
            model=self.model,
            messages=messages,
            temperature=0,
            max_tokens=MAX_TOKENS,
            logprobs=True,
            extra_body=extra,
            **options,
        )
        tokens = answer.choices[0].logprobs.content
        return Generated([int(token.token.split(":")[1]) for token in tokens], [token.logprob for token in tokens])


def url_part(image: Image.Image) -> dict:
    file = io.BytesIO()
    image.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def user(*parts) -> list[dict]:
    """One turn; a text, or an image in whatever form."""
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]


def for_transformers(image: Image.Image) -> dict:
    return {"type": "image", "image": image}
