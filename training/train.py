"""The training loop: one or several GPUs through torchrun, or the CPU; resumable; ends annealed when its time is up.

The learning rate warms up, stays, and falls to nothing over the last part of the budget. The budget is minutes of
training summed over all calls (or a number of steps), so a run that is cut into leases of a machine is one run.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from .data import Batches, BatchMaker, TiledBatchMaker
from .model import SMOKE_SIZE, ModelSize, TrainingModel, parameter_count
from .optimizer import build_optimizers
from .questions import KINDS
from .render import GROUPS, renderer_constants
from .tiled_model import TiledTrainingModel
from .weights import load_weights, save_weights


RATES = {"": 2e-3, "llava.model.language_model": 3e-3, "llava.model.multi_modal_projector": 3e-3, "logit_scale": 1e-2}
LONGEST_STEP = 1.0  # seconds that one step may count for: compilation is not training time
FAMILIES = {"llava": (TrainingModel, BatchMaker), "next": (TiledTrainingModel, TiledBatchMaker)}


@dataclass
class TrainingOptions:
    """What one call of `python -m training train` may set."""

    folder: str = "runs/tiny"
    family: str = "llava"
    base: str | None = None  # folder of the run or checkpoint of family "llava" from which family "next" starts
    smoke: bool = False
    minutes: float | None = None
    steps: int | None = None
    stop_after: float = float("inf")  # seconds since this call began: write the state and leave
    stop_at_step: int | None = None
    batch_size: int = 256  # scenes per process; of family "next", views
    warmup: int = 300
    decay: float = 0.4
    rate: float = 1.0
    weight_decay: float = 0.02
    contrastive: float = 0.5
    dense: float = 1.0
    seed: int = 0
    workers: int = 8
    compile: bool = False
    log_every: int = 50
    validate_every: int = 500
    save_every: float = 120.0


class Progress:
    """How much of the budget is used, by steps or by training time."""

    def __init__(self, options: TrainingOptions) -> None:
        if (options.minutes is None) == (options.steps is None):
            raise ValueError(f"minutes={options.minutes} and steps={options.steps}: give exactly one of them")
        self.options, self.step, self.seconds = options, 0, 0.0

    @property
    def share(self) -> float:
        if self.options.steps is not None:
            return self.step / self.options.steps
        return self.seconds / (60 * (self.options.minutes or 0))

    def rate(self) -> float:
        """Factor on the learning rates."""
        warm = min(1.0, (self.step + 1) / self.options.warmup)
        return self.options.rate * warm * min(1.0, max(0.0, (1 - self.share) / self.options.decay))


def _average_gradients(parameters: list[torch.nn.Parameter], ranks: int) -> Tensor:
    """Averages gradients over the processes, clips their norm to 1 (a broken one to 0) and returns the norm."""
    gradients = [parameter.grad for parameter in parameters]
    if ranks > 1:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
        torch._foreach_copy_(
            gradients,
            [part.view_as(gradient) for part, gradient in zip(flat.split([g.numel() for g in gradients]), gradients)],
        )
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    if not norm.isfinite():
        torch._foreach_zero_(gradients)
    else:
        torch._foreach_mul_(gradients, (1 / norm.clamp_min(1.0)))
    return norm


class Measures:
    """Sums of the measures of several batches, on the device, and their means by name."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.batches = 0

    def add(self, result: dict[str, Tensor], kinds: Tensor) -> None:
        right = result["turn_right"] & (kinds >= 0)
        place = kinds.clamp_min(0)
        asked = torch.zeros(len(KINDS), device=kinds.device).scatter_add_(
            0, place.flatten(), (kinds >= 0).flatten().float()
        )
        hits = torch.zeros_like(asked).scatter_add_(0, place.flatten(), right.flatten().float())
        first_asked = torch.zeros_like(asked).scatter_add_(
            0, place[:, 0], torch.ones_like(place[:, 0], dtype=torch.float)
        )
        first_hits = torch.zeros_like(asked).scatter_add_(0, place[:, 0], right[:, 0].float())
        values = {name: value.detach() for name, value in result.items() if name != "turn_right"}
        values |= {"asked": asked, "hits": hits, "first_asked": first_asked, "first_hits": first_hits}
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.batches += 1

    def means(self) -> dict[str, float]:
        sums = {name: value.float().cpu() for name, value in self.sums.items()}
        result = {name: (sums[name] / self.batches).item() for name in ("answers", "contrastive", "dense", "retrieved")}
        for part in ("dense", "tile"):
            if f"{part}_accuracy" in sums:
                accuracies = (sums[f"{part}_accuracy"] / self.batches).tolist()
                result |= dict(zip((f"{part}_{group}" for group in GROUPS), accuracies))
        result |= dict(zip(KINDS, (sums["hits"] / sums["asked"].clamp_min(1)).tolist()))
        result |= dict(
            zip((f"first_{kind}" for kind in KINDS), (sums["first_hits"] / sums["first_asked"].clamp_min(1)).tolist())
        )
        return {name: round(value, 4) for name, value in result.items()}


def _new_model(options: TrainingOptions) -> TrainingModel:
    """The untrained model of a family, or the one that goes on from another's weights."""
    size = SMOKE_SIZE if options.smoke else ModelSize()
    if options.family not in FAMILIES:
        raise ValueError(f"family={options.family!r} is not one of {tuple(FAMILIES)}")
    model_class, _ = FAMILIES[options.family]
    model = model_class(size)
    if isinstance(model, TiledTrainingModel):
        if options.base is None:
            raise ValueError("base=None: name the run or the checkpoint of family 'llava' that 'next' starts from")
        model.start_from(load_weights(Path(options.base), options.smoke))
    elif options.base is not None:
        raise ValueError(f"base={options.base!r} is for family 'next': 'llava' is trained from scratch")
    return model


def train(options: TrainingOptions) -> TrainingModel:
    """Trains until the budget or this call's time is used up; the state in `folder` is where the next call goes on."""
    began = time.monotonic()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if ranks > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    model = _new_model(options).to(device)
    maker_class = FAMILIES[options.family][1]
    constants = renderer_constants(device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizers = build_optimizers(model, RATES, options.weight_decay)
    progress = Progress(options)
    state_file = folder / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, value in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(value)
        progress.step, progress.seconds = state["step"], state["seconds"]
    elif (folder / "weights-0.safetensors").exists():
        raise ValueError(
            f"{folder} has weights but no state.pt to go on from: name another folder, or put state.pt back"
        )
    if options.compile:
        model.compile_parts()
    last = options.steps if options.steps is not None else 10**7
    batches = Batches("train", options.batch_size, progress.step, last, rank, ranks, options.seed, maker_class)
    loader = iter(
        DataLoader(
            batches,
            batch_size=None,
            num_workers=options.workers,
            pin_memory=cuda,
            prefetch_factor=4 if options.workers else None,
        )
    )
    maker = maker_class("validation", options.seed)
    prefix = torch.tensor([maker.prefix], device=device)

    def move(batch: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        } | {"prefix": prefix}

    def losses(batch: dict[str, Any], jitter: bool) -> dict[str, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            return model(batch, constants, jitter)

    def write(row: dict) -> None:
        if rank == 0:
            with (folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

    def save() -> None:
        if rank == 0:
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": progress.step,
                "seconds": progress.seconds,
            }
            torch.save(state, state_file.with_suffix(".part"))
            os.replace(state_file.with_suffix(".part"), state_file)
            save_weights(model, folder)

    if rank == 0 and progress.step == 0:
        write({"options": asdict(options), "parameters": parameter_count(model), "processes": ranks})
    bar = tqdm(total=options.steps, initial=progress.step, disable=rank != 0, mininterval=5)
    measures = Measures()
    validation: list[dict[str, Any]] = []
    saved = stepped = time.monotonic()
    while progress.share < 1 and (options.stop_at_step is None or progress.step < options.stop_at_step):
        batch = move(next(loader))
        torch.manual_seed((options.seed * 10**7 + progress.step) * ranks + rank)  # of the positions' jitter
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * progress.rate()
        result = losses(batch, jitter=True)
        loss = result["answers"] + options.contrastive * result["contrastive"] + options.dense * result["dense"]
        loss.backward()
        norm = _average_gradients(parameters, ranks)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        measures.add(result, batch["kinds"])
        progress.step += 1
        now = time.monotonic()
        progress.seconds += min(now - stepped, LONGEST_STEP)
        stepped = now
        bar.update()
        if progress.step % options.log_every == 0:
            row = {"step": progress.step, "seconds": round(progress.seconds, 1), "rate": round(progress.rate(), 4)}
            row |= {"norm": round(norm.item(), 3), "wall": round(now - began, 1)} | measures.means()
            measures = Measures()
            write(row)
            if rank == 0:
                brief = {
                    name: row[name]
                    for name in ("step", "seconds", "answers", "dense", "contrastive", "retrieved", *KINDS)
                }
                tqdm.write(json.dumps(brief))
        leave = time.monotonic() - began > options.stop_after
        if ranks > 1 and progress.step % 10 == 0:  # all processes must agree on the schedule and on when to stop
            shared = torch.tensor([progress.seconds, float(leave)], dtype=torch.float64, device=device)
            dist.broadcast(shared, 0)
            progress.seconds, leave = shared[0].item(), bool(shared[1].item())
        elif ranks > 1:
            leave = False
        if progress.step % options.validate_every == 0 and rank == 0:
            validation = validation or [
                move(maker(list(range(start, start + options.batch_size))))
                for start in range(0, 4 * options.batch_size, options.batch_size)
            ]
            measured = Measures()
            for held in validation:  # with gradients on, though unused: without them every graph compiles again
                measured.add(losses(held, jitter=False), held["kinds"])
            write({"step": progress.step, "seconds": round(progress.seconds, 1), "validation": measured.means()})
        if time.monotonic() - saved > options.save_every:
            save()
            saved = time.monotonic()
        if leave:
            break
    save()
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()
    bar.close()
    return model
