"""The models of a service: the one that it was started with, and others that are loaded when somebody asks for them."""

import asyncio
from collections.abc import Callable, Mapping

from opensan.errors import UserError
from opensan.segmenters.base import Segmenter
from opensan.segmenters.results import Encoding
from opensan.serve.limits import Problem


class Models:
    """Segmenters by name. An encoding is labelled by the model that made it. Used from one event loop."""

    def __init__(self, segmenter: Segmenter, others: Mapping[str, Callable[[], Segmenter]]) -> None:
        """`others` are functions that load further models, by name."""
        self.default = segmenter
        name = segmenter.identity.name
        self._loaded = {name: segmenter}
        self._loaders = {other: load for other, load in others.items() if other != name}
        self._loading = asyncio.Lock()

    @property
    def names(self) -> list[str]:
        """Names of all models, the default first."""
        return [self.default.identity.name, *self._loaders]

    async def get(self, name: str | None) -> Segmenter:
        """Return the model of that name, None for the default, loaded at its first use.

        Raises Problem: 422 for an unknown name, 503 for a model that cannot be loaded.
        """
        if name is None:
            return self.default
        if name not in self.names:
            raise Problem(422, f"there is no model {name[:100]!r} here: choose from {', '.join(self.names)}")
        async with self._loading:
            if name not in self._loaded:
                try:
                    self._loaded[name] = await asyncio.to_thread(self._loaders[name])
                except (UserError, OSError) as error:
                    raise Problem(503, f"the model {name} cannot be loaded ({error})") from None
        return self._loaded[name]

    def can_use(self, encoding: Encoding) -> bool:
        """Return whether a model that is loaded made an encoding; another version of it cannot use it."""
        return any(each.identity.encodings == encoding.model for each in self._loaded.values())

    def of(self, encoding: Encoding) -> Segmenter:
        """Return the model that made an encoding."""
        return next(each for each in self._loaded.values() if each.identity.encodings == encoding.model)
