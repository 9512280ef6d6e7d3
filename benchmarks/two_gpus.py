"""Several GPUs by existing means: the same answers as on one.

    torchrun --nproc-per-node 2 -m benchmarks.two_gpus --model checkpoints/tiny

Each process answers alone first. Then each answers its share of the prompts (accelerate), then one process spreads the
layers (`device_map`, GPUs only), then the language model is sharded over all processes (`tp_plan="auto"`). That is left
out where they do not divide its attention heads: the embedded checkpoint has 5. Runs on CPU processes too, as a check
of the script. Exit status 1 if an answer differs.
"""

import argparse
import os
import sys
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.distributed import DistributedConfig

import recoverable_llava  # noqa: F401 - registers the classes


PROMPTS = [f"USER: <image>\nwhat is {thing} ? ASSISTANT:" for thing in ("this", "red", "left", "the colour of it")]


def pictures() -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(96, 80), (64, 128), (100, 100), (80, 96)]
    return [
        Image.fromarray(torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8).numpy())
        for size in sizes
    ]


def answer(model: Any, processor: Any, rows: list[int]) -> list[list[int]]:
    """New tokens of the prompts `rows`, greedy, without the padding behind an answer that ends before the others."""
    images = pictures()
    inputs = processor(
        images=[[images[row]] for row in rows],
        text=[PROMPTS[row] for row in rows],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    with torch.no_grad():
        sequences = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answers = sequences[:, inputs["input_ids"].shape[1] :].tolist()
    end = model.generation_config.eos_token_id
    return [ids[: ids.index(end)] if end in ids else ids for ids in answers]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or repo id of a model with recoverable compression")
    arguments = parser.parse_args()
    # In TF32, the default of convolutions, patches are rounded otherwise in a batch of another size.
    torch.backends.cudnn.allow_tf32 = False
    state = PartialState(cpu=not torch.cuda.is_available())
    has_gpus = torch.cuda.is_available()
    processor = AutoProcessor.from_pretrained(arguments.model)
    everything = list(range(len(PROMPTS)))

    def load(**kwargs: Any) -> Any:
        return AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=torch.float32, **kwargs).eval()

    alone = load().to(state.device)
    config = alone.config
    expected = answer(alone, processor, everything)
    same = []

    def compare(name: str, found: list[list[int]]) -> None:
        same.append(found == expected)
        if state.is_main_process:
            print(f"{'same' if same[-1] else 'DIFFERENT'}: {name}", flush=True)

    with state.split_between_processes(everything) as share:
        shares = gather_object(answer(alone, processor, share))
    compare(f"accelerate, {state.num_processes} processes", shares)
    del alone

    if has_gpus and torch.cuda.device_count() > 1 and state.is_main_process:
        spread = load(device_map="balanced")
        devices = sorted({str(device) for device in spread.hf_device_map.values()})
        compare(f"device_map, on {devices}", answer(spread, processor, everything))
        del spread
    state.wait_for_everyone()

    heads = config.text_config.num_key_value_heads
    if heads % state.num_processes and state.is_main_process:
        print(f'left out: tp_plan="auto": {heads} heads do not part into {state.num_processes}', flush=True)
    if state.num_processes > 1 and heads % state.num_processes == 0:
        sharded = load(distributed_config=DistributedConfig(tp_plan="auto"))
        found = answer(sharded, processor, everything)
        weight = sharded.model.language_model.layers[0].mlp.up_proj.weight
        local = getattr(weight, "to_local", lambda: weight)()
        name = f'tp_plan="auto", {state.num_processes} processes, up_proj {tuple(local.shape)} of {tuple(weight.shape)}'
        compare(name, found)
    state.wait_for_everyone()
    return 0 if all(same) else 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os._exit(status)
