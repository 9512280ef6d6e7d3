"""What `test_distributed` runs in two processes of one machine: a few training steps, sharded or replicated.

    python distributed_training.py FOLDER RANK PORT REPORT WAY [WAY ...]

trains the repo in FOLDER as each function WAY says, and rank 0 writes their losses to REPORT as JSON.
Both ranks see the same batch, so that the losses must be those of a single process.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


STEPS = 3


def batch(folder: str) -> dict[str, torch.Tensor]:
    return torch.load(Path(folder) / "batch.pt", weights_only=True)


def load(folder: str) -> Any:
    from recoverable_llava import RecoverableLlavaForConditionalGeneration

    model = RecoverableLlavaForConditionalGeneration.from_pretrained(folder)
    return model.train()


def train(model: Any, folder: str) -> list[float]:
    inputs = batch(folder)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(STEPS):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def alone(folder: str) -> list[float]:
    model = load(folder)
    model.model.vision_tower.requires_grad_(False)
    return train(model, folder)


def ddp(folder: str) -> list[float]:
    """As most fine-tunes run it: the vision tower is frozen, all else is trained, no search for unused parameters."""
    model = load(folder)
    model.model.vision_tower.requires_grad_(False)
    return train(nn.parallel.DistributedDataParallel(model), folder)


def adapted(folder: str) -> Any:
    import peft

    model = load(folder)
    torch.manual_seed(0)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    outside = [name for name in names if "vision_tower" not in name and "lm_head" not in name]
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=outside, r=2, init_lora_weights=False))


def lora_alone(folder: str) -> list[float]:
    return train(adapted(folder), folder)


def ddp_lora(folder: str) -> list[float]:
    return train(nn.parallel.DistributedDataParallel(adapted(folder)), folder)


def shard_layers(model: Any, shard: Any) -> None:
    """`shard` on every layer that the model itself calls indivisible, innermost first."""
    for module in reversed(list(model.modules())):
        if type(module).__name__ in model._no_split_modules:
            shard(module)


def fsdp(folder: str) -> list[float]:
    from torch.distributed.fsdp import fully_shard

    model = load(folder)
    model.model.vision_tower.requires_grad_(False)
    shard_layers(model, fully_shard)
    fully_shard(model)
    return train(model, folder)


if __name__ == "__main__":
    folder, rank, port, report, *ways = sys.argv[1:]
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, WORLD_SIZE="2")
    dist.init_process_group("gloo")
    losses = {way: globals()[way](folder) for way in ways}
    if rank == "0":
        Path(report).write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()
