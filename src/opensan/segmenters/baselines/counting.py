"""Stages of a baseline, for counting its operations."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Stage(NamedTuple):
    """A part of a method's work on one image."""

    name: str
    run: Callable[[], Any]
    """Computes the part, on tensors with or without memory."""
    times: int = 1
    """How often the part is computed: once a proposal, for example."""
