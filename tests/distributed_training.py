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
HAS_GPUS = torch.cuda.device_count() > 1


def device() -> torch.device:
    """Of this rank: a GPU of its own, where there are two."""
    return torch.device("cuda", int(os.environ["RANK"])) if HAS_GPUS else torch.device("cpu")


def batch(folder: str) -> dict[str, torch.Tensor]:
    inputs = torch.load(Path(folder) / "batch.pt", weights_only=True)
    return {name: value.to(device()) for name, value in inputs.items()}


def load(folder: str) -> Any:
    from transformers import AutoModelForImageTextToText

    import recoverable_llava  # noqa: F401  (registers its classes)

    model = AutoModelForImageTextToText.from_pretrained(folder)
    return model.to(device()).train()


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


def fsdp1(folder: str) -> list[float]:
    """The older FullyShardedDataParallel, which runs on GPUs alone."""
    from functools import partial

    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

    model = load(folder)
    model.model.vision_tower.requires_grad_(False)
    policy = partial(lambda_auto_wrap_policy, lambda_fn=lambda m: type(m).__name__ in model._no_split_modules)
    return train(FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True), folder)


def zero3(folder: str) -> list[float]:
    """DeepSpeed ZeRO-3, where it is installed."""
    import deepspeed

    model = load(folder)
    model.model.vision_tower.requires_grad_(False)
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    inputs, losses = batch(folder), []
    for _ in range(STEPS):
        loss = engine(**inputs).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


if __name__ == "__main__":
    folder, rank, port, report, *ways = sys.argv[1:]
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2")
    if HAS_GPUS:
        torch.cuda.set_device(int(rank))
    dist.init_process_group("nccl" if HAS_GPUS else "gloo")
    losses = {way: globals()[way](folder) for way in ways}
    if rank == "0":
        Path(report).write_text(json.dumps(losses))
    dist.barrier()
    dist.destroy_process_group()
