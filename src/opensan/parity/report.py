"""The result of comparing one tensor or number with the official one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """Difference between our value and the official one, with its limit."""

    name: str
    value: float
    """The largest difference (absolute or relative, as `name` says)."""
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit (nan is not)."""
        return self.value <= self.limit
