"""Check devices for torch."""

import torch

from opensan.errors import UserError


def chosen_device(device: str | torch.device) -> str | torch.device:
    """Return `device`, or for "auto" the name of the one to use: "cuda" where torch finds one, else "cpu"."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def checked_device(device: str | torch.device) -> torch.device:
    """Return `device`, "auto" included. Raises UserError if torch does not know it or the machine has none."""
    try:
        known = torch.device(chosen_device(device))
        torch.empty(1, device=known)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # torch's message continues with a page about its build
        raise UserError(f"device {str(device)!r} cannot be used here ({reason})") from None
    return known
