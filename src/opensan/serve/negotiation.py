"""Choose the form of a response by the client's headers (RFC 9110, section 12.5.1)."""

from collections.abc import Sequence


def best_media_type(accept: str, offered: Sequence[str]) -> str | None:
    """Return the first of `offered` that the header `accept` values highest; None if none. No header accepts all."""
    ranges = [_range(part) for part in accept.split(",") if part.strip()] or [("*/*", 1.0)]
    values = [_value(media_type, ranges) for media_type in offered]
    best = max(values)
    return offered[values.index(best)] if best > 0 else None


def accepts_gzip(accept_encoding: str) -> bool:
    """Return whether the header `accept_encoding` allows gzip (RFC 9110, section 12.5.3)."""
    values = dict(_range(part) for part in accept_encoding.split(",") if part.strip())
    return values.get("gzip", values.get("*", 0.0)) > 0


def _range(part: str) -> tuple[str, float]:
    media_type, *parameters = (piece.strip().lower() for piece in part.split(";"))
    value = 1.0
    for parameter in parameters:
        name, _, text = parameter.partition("=")
        if name.strip() == "q":
            try:
                value = float(text)
            except ValueError:
                value = 0.0
    return media_type, value


def _value(media_type: str, ranges: Sequence[tuple[str, float]]) -> float:
    """Return the value of the most specific range that matches."""
    for wanted in (media_type, f"{media_type.partition('/')[0]}/*", "*/*"):
        for given, value in ranges:
            if given == wanted:
                return value
    return 0.0
