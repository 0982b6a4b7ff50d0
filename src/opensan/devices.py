"""Devices that torch computes on."""

import torch

from opensan.errors import UserError


def checked_device(device: str | torch.device) -> torch.device:
    """Raises ValueError when torch does not know `device` or the machine does not have it."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # torch goes on for a page about what it is built of
        raise UserError(f"device {str(device)!r} cannot be used here ({reason})") from None
    return found
