"""Read configuration from files, with errors that name the file and the key."""

import difflib
import json
from pathlib import Path

from pydantic import ValidationError

from opensan.config.base import Config, ConfigT, dotted_keys
from opensan.config.encoders import KINDS
from opensan.config.model import ModelConfig
from opensan.errors import UserError, short

CONFIG_NAME = "config.json"
"""Name of the configuration file in a model's folder."""
TOKENIZER_NAME = "tokenizer.json"
"""Name of a file beside the weights of a model whose text tower does not read CLIP's tokens."""
EXPORT_NAME = "export.json"
"""Name of a file that only an exported model's folder has."""

_TAGS = KINDS | {"clip_text", "siglip_text"}


def parse_config(kind: type[ConfigT], data: object, source: str) -> ConfigT:
    """Validate `data` (parsed JSON or YAML) as `kind`. Raises ValueError, one line, naming `source` and the key."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        errors = error.errors()
        # A misspelt key is also a missing one; the misspelling is the better message.
        first = next((error_entry for error_entry in errors if error_entry["type"] == "extra_forbidden"), errors[0])
        loc = tuple(part for part in first["loc"] if part not in _TAGS)  # pydantic adds which kind it took
        where = ".".join(short(str(part))[1:-1] for part in loc) or "top level"
        if first["type"] == "extra_forbidden":
            raise UserError(f"{source}: {where}: no such key{_nearest_key(kind, loc)}") from None
        if first["type"] == "union_tag_invalid":
            known = ", ".join(sorted(KINDS))
            raise UserError(f"{source}: {where}.kind: {first['ctx']['tag']!r} is not one of {known}") from None
        problem = first["msg"].removeprefix("Value error, ")
        given = f", not {short(first['input'])}" if isinstance(first["input"], str | int | float) else ""
        raise UserError(f"{source}: {where}: {problem}{given}") from None


def _nearest_key(kind: type[Config], location: tuple[int | str, ...]) -> str:
    """Return a hint for an unknown key: the most similar known key, else all known keys at its level."""
    parts = [part for part in location if isinstance(part, str)]
    known = list(dotted_keys(kind))
    if near := difflib.get_close_matches(".".join(parts), known, n=1):
        return f" (the nearest is {near[0]})"
    beside = [key.split(".")[-1] for key in known if key.split(".")[:-1] == parts[:-1]]
    return f" (known: {', '.join(beside)})" if beside else ""


def read_config(path: Path) -> ModelConfig:
    """Read a checkpoint's config.json. Raises UserError, one line, if it is not valid."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist; a model is weights with their {path.name} beside them") from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not JSON, an endless number, endless nesting
        raise UserError(f"{path}: not a readable model configuration ({error})") from None
    return parse_config(ModelConfig, data, str(path))
