"""Read YAML as plain data; every error is one line that names the key."""

from collections.abc import Iterator
from typing import Any

import yaml

from opensan.errors import UserError, reason, short


def read_yaml(text: str, source: str) -> Any:
    """Read the data in `text`: mappings, lists, texts, numbers, true, false and null. A date is text.

    Raises UserError, one line, beginning with `source` and naming the key or the line.
    """
    loader = None
    try:
        loader = _Loader(text)
        loader.root = loader.get_single_node()
        return None if loader.root is None else loader.construct_document(loader.root)
    except RecursionError:
        raise UserError(f"{source}: its YAML is nested too deeply") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML ({_reason(error)})") from None
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


class _Loader(yaml.SafeLoader):
    """Loader that names the key of a value that does not fit its tag, and refuses repeated keys."""

    root: yaml.Node | None = None
    yaml_implicit_resolvers = {  # noqa: RUF012 (as PyYAML has it)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (UserError, RecursionError):
            raise
        except yaml.MarkedYAMLError as error:
            problem = str(error.problem)
        except Exception:  # PyYAML's conversions raise errors of many kinds
            problem = f"{short(node.value)} is no {node.tag.rpartition(':')[2]}"
        key = next(_keys_of(self.root, node), "")
        raise UserError(f"{key}: {problem}" if key else problem)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        known: set[str] = set()
        for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
                if name.value in known:
                    raise UserError(f"{next(_keys_of(self.root, value), name.value)}: stands there twice")
                known.add(name.value)
        return super().construct_mapping(node, deep)


def _keys_of(root: yaml.Node | None, wanted: yaml.Node, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of node `wanted`."""
    if root is wanted:
        yield prefix
    elif isinstance(root, yaml.MappingNode):
        for key, value in root.value:
            name = str(key.value)[:60] if isinstance(key, yaml.ScalarNode) else "?"
            yield from _keys_of(value, wanted, f"{prefix}.{name}".lstrip("."))
    elif isinstance(root, yaml.SequenceNode):
        for number, value in enumerate(root.value):
            yield from _keys_of(value, wanted, f"{prefix}.{number}".lstrip("."))


def _reason(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is not None and problem:
        return f"line {mark.line + 1}: {problem}"
    return reason(error)
