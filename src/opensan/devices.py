"""Check devices for torch."""

import torch

from opensan.errors import UserError


def checked_device(device: str | torch.device) -> torch.device:
    """Return `device`. Raises UserError if torch does not know it or the machine does not have it."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # torch's message continues with a page about its build
        raise UserError(f"device {str(device)!r} cannot be used here ({reason})") from None
    return found
