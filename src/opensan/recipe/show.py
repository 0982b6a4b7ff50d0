"""Print a configuration as YAML with a comment for each field."""

from collections.abc import Iterator
from typing import Any

import yaml

from opensan.config import Config, field_descriptions

COMMENT_COLUMN = 40


def to_yaml(config: Config) -> str:
    """Return all of `config`, defaults too, as commented YAML that reads back as the same configuration."""
    return "\n".join(_lines(config, "")) + "\n"


def _lines(config: Config, indent: str) -> Iterator[str]:
    data = config.model_dump(mode="json")
    described = field_descriptions(type(config))
    for name in type(config).model_fields:
        value = getattr(config, name)
        comment = " ".join(described.get(name, "").split())
        if isinstance(value, Config):
            yield _commented(f"{indent}{name}:", comment or _purpose(value))
            yield from _lines(value, indent + "  ")
        elif isinstance(value, tuple) and value and all(isinstance(member, Config) for member in value):
            yield _commented(f"{indent}{name}:", comment)
            for member in value:
                first, *others = _lines(member, indent + "    ")
                yield f"{indent}  - {first.lstrip()}"
                yield from others
        else:
            yield _commented(f"{indent}{name}: {_flow(data[name])}", comment)


def _purpose(config: Config) -> str:
    return " ".join((type(config).__doc__ or "").split("\n\n")[0].split())


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


def _commented(line: str, comment: str) -> str:
    return f"{line:<{COMMENT_COLUMN}}  # {comment}" if comment else line
