"""Ask vLLM without a server: several questions about a picture in one batch, at two budgets.

    pip install -e ".[vllm]"                                    # on a machine with a GPU
    python examples/ask_vllm_offline.py OWNER/REPO

Here, on a CPU: `make .venv-vllm/.installed`, then `.venv-vllm/bin/python examples/ask_vllm_offline.py`.
"""

import sys
from pathlib import Path

from PIL import Image


try:
    from vllm import LLM, SamplingParams
except ImportError:
    sys.exit("This needs vLLM: make .venv-vllm/.installed, or pip install vllm beside a GPU")

QUESTIONS = ["What word is under the lemon?", "What color is the plate of the penguin?", "Where is the cactus?"]


def main() -> None:
    if not Path("demo/scene.png").is_file():
        sys.exit("Run this from the root of the repository: it asks about demo/scene.png.")
    if len(sys.argv) > 1:
        model = LLM(sys.argv[1])
    else:
        model = LLM(
            "checkpoints/tiny", enforce_eager=True, gpu_memory_utilization=0.1, kv_cache_memory_bytes=256 * 2**20
        )
    picture = Image.open("demo/scene.png")
    requests = [
        {
            "prompt": f"USER: <image>\n{question} ASSISTANT:",
            "multi_modal_data": {"image": picture},
            "mm_processor_kwargs": {"visual_token_budget": budget},
        }
        for budget in (16, 64)
        for question in QUESTIONS
    ]
    for output in model.generate(requests, SamplingParams(temperature=0, max_tokens=64)):
        question = output.prompt.removeprefix("USER: <image>\n").removesuffix(" ASSISTANT:")
        print(f"{question}  {output.outputs[0].text.strip()}  ({len(output.prompt_token_ids)} prompt tokens)")


if __name__ == "__main__":  # vLLM starts processes of its own, which import this file
    main()
