"""Muon for the matrices inside the layers (batched over matrices of one shape) beside AdamW for everything else.

Muon (Jordan 2024, "Muon is scalable for LLM training", arXiv 2502.16982) replaces the momentum of a matrix by its
nearest orthogonal matrix. torch.optim.Muon loops over matrices; at this size that loop costs a fifth of a step, so
matrices of one shape are stacked here and orthogonalised together.
"""

import torch
from torch import Tensor, nn


NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearest (semi-)orthogonal matrices [n, a, b], to the accuracy that an update needs."""
    value = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = value.shape[1] > value.shape[2]
    value = value.mT if tall else value
    value = value / (value.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for first, second, third in NEWTON_SCHULZ:
        gram = value @ value.mT
        value = first * value + (second * gram + third * gram @ gram) @ value
    return (value.mT if tall else value).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; updates have the size of AdamW's (root mean square 0.2), so rates are comparable.

    Args:
        groups: parameter groups; all matrices of one group have one shape.
    """

    def __init__(self, groups: list[dict], momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(groups, {"lr": 1e-3, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = group["params"]
            gradients = torch.stack([parameter.grad for parameter in parameters])
            state = self.state[parameters[0]]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradients)
            state["momentum"].lerp_(gradients, 1 - group["momentum"])
            update = orthogonal(gradients.lerp(state["momentum"], group["momentum"]))
            scale = 0.2 * max(update.shape[1:]) ** 0.5 * group["lr"]
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, list(update.unbind(0)), alpha=-scale)


def build_optimizers(model: nn.Module, rates: dict[str, float], weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon and AdamW with a base rate for each part of the model.

    Args:
        rates: learning rate by prefix of parameter names; the longest fitting prefix counts, "" is the default.
    """

    def rate(name: str) -> float:
        return rates[max((prefix for prefix in rates if name.startswith(prefix)), key=len)]

    matrices: dict[tuple, list[nn.Parameter]] = {}
    others: dict[tuple, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        inside = "layers." in name or "multi_modal_projector" in name
        if parameter.ndim == 2 and inside:
            matrices.setdefault((rate(name), tuple(parameter.shape)), []).append(parameter)
        else:
            others.setdefault((rate(name), parameter.ndim >= 2 and "embed" not in name), []).append(parameter)
    muon = Muon([{"params": value, "lr": key[0]} for key, value in matrices.items()], weight_decay=weight_decay)
    groups = [{"params": value, "lr": key[0], "weight_decay": weight_decay * key[1]} for key, value in others.items()]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=next(model.parameters()).is_cuda)
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["base"] = group["lr"]
    return [muon, adamw]
