"""One line of a parity report."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """How far our number is from the official one, and how far it may be."""

    name: str
    value: float
    """The largest difference found (absolute or relative, as `name` says)."""
    limit: float

    @property
    def passed(self) -> bool:
        """Within the limit (nan is not)."""
        return self.value <= self.limit
