"""Keep a share of the weights that a fine-tuning started from: between the two, a model forgets fewer words.

The idea is that of Wortsman et al., "Robust fine-tuning of zero-shot models" (CVPR 2022), for CLIP as a classifier.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from opensan.model import SAN


class Blend:
    """The trained parameters that a model starts with, of which it keeps a share."""

    def __init__(self, model: SAN, keep: float) -> None:
        """Copy the parameters as they are now. `keep` is their share in a blended model, in [0, 1)."""
        self.keep = keep
        self._model = model
        self._start = {name: values.detach().clone() for name, values, _ in model.trained()} if keep else {}

    def apply(self) -> None:
        """Replace each trained parameter by its mean with the one at the start, weighted by their shares."""
        with torch.no_grad():
            for name, start in self._start.items():
                self._model.get_parameter(name).lerp_(start, self.keep)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Apply it for a while; then every parameter is again as it was, to the last bit."""
        trained = {name: self._model.get_parameter(name).detach().clone() for name in self._start}
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, values in trained.items():
                    self._model.get_parameter(name).copy_(values)
