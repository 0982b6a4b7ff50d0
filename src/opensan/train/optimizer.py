"""Build SAN's optimizer: trained parameters, their weight decay, and the schedule of the learning rate."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from opensan.model import SAN


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share their optimizer settings."""

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    learning_rate: float
    weight_decay: float


def san_parameter_groups(
    model: SAN, *, learning_rate: float = 1e-4, weight_decay: float = 1e-4
) -> list[ParameterGroup]:
    """Put the trained parameters of a SAN (see `SAN.trained`) in two groups: with `weight_decay`, and without."""
    trained = model.trained()
    return [
        ParameterGroup(
            tuple(parameter.name for parameter in trained if parameter.decayed is decayed),
            tuple(parameter.parameter for parameter in trained if parameter.decayed is decayed),
            learning_rate=learning_rate,
            weight_decay=weight_decay if decayed else 0.0,
        )
        for decayed in (True, False)
    ]


def build_adamw(groups: Iterable[ParameterGroup]) -> torch.optim.AdamW:
    """Return AdamW with decoupled decay, betas (0.9, 0.999), eps 1e-8; each group keeps its own initial rate."""
    return torch.optim.AdamW(
        [
            {
                "params": list(group.parameters),
                "lr": group.learning_rate,
                "initial_lr": group.learning_rate,
                "weight_decay": group.weight_decay,
            }
            for group in groups
        ],
        betas=(0.9, 0.999),
        eps=1e-8,
    )


def poly_factor(step: int, steps: int, power: float = 0.9, warmup: int = 0) -> float:
    """Return the factor of the initial learning rate at `step` = 0, 1, ...: (1 - step / steps) ** power.

    `warmup` steps rise linearly to it (SAN itself has none).
    """
    factor = max(1.0 - step / steps, 0.0) ** power
    return factor * min(1.0, (step + 1) / warmup) if warmup else factor


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times its initial one."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> torch.Tensor:
    """Scale all gradients so that their joint L2 norm is at most `limit`; return the norm before, a scalar tensor.

    The factor is limit / (norm + 1e-6), as in the official code. The norm stays on the device.
    """
    return nn.utils.clip_grad_norm_(parameters, limit)
