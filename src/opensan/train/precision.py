"""Choose the number format of the forward pass, and scale losses for float16.

Weights, losses, gradients and the optimizer's state are float32 whatever is chosen here.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

Precision = Literal["auto", "float32", "bfloat16", "float16"]


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """Return the dtype of the forward pass on `device`; None for float32.

    `auto` is bfloat16 on a CUDA device that has it, float16 on another one, and float32 elsewhere.
    """
    if precision != "auto":
        return None if precision == "float32" else getattr(torch, precision)
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


class LossScale:
    """Keeps float16 gradients within range: the loss is multiplied by a power of two, the gradients divided by it.

    The scale halves when gradients overflow, and doubles after 2,000 good steps (torch's GradScaler does the same; here
    the decision follows from the joint gradient norm, which all ranks share, however the parameters are distributed).
    An overflow at a scale above 1 is due to the scale: the step is skipped, and is not one of the failed steps that
    stop the run. At a scale of 1 it is.
    """

    START = 65_536.0
    FLOOR = 1.0
    GROWTH_INTERVAL = 2_000

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.value = self.START if enabled else 1.0
        self._good_steps = 0

    def remove_from(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale, in place; exact but for underflow, because it is a power of two."""
        if self.enabled:
            torch._foreach_mul_([owner.grad for owner in parameters if owner.grad is not None], 1 / self.value)

    def step_was_good(self) -> None:
        """Count a step with finite gradients."""
        self._good_steps += 1
        if self.enabled and self._good_steps == self.GROWTH_INTERVAL:
            self.value, self._good_steps = self.value * 2, 0

    def shrink(self) -> bool:
        """Halve the scale after gradients that were not finite; return False if it is off or already 1."""
        if not self.enabled or self.value <= self.FLOOR:
            return False
        self.value, self._good_steps = self.value / 2, 0
        return True

    def state(self) -> dict[str, float] | None:
        """Return the scale for a checkpoint; None if it is off."""
        return {"value": self.value, "good_steps": self._good_steps} if self.enabled else None

    def load(self, state: dict[str, float] | None) -> None:
        """Continue from `state`; without effect if the run had no scale or this device needs none."""
        if self.enabled and state is not None:
            self.value, self._good_steps = state["value"], int(state["good_steps"])
