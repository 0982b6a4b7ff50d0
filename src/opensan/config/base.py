"""The base of all configuration, and the ranges of its numbers."""

import ast
import inspect
import itertools
import textwrap
from collections.abc import Collection, Iterator
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

# Limits far above any real model, so that a number in someone's file can't cause unbounded memory use.
Count = Annotated[int, Field(gt=0, le=65_536)]
LayerCount = Annotated[int, Field(gt=0, le=1_024)]
LayerNumber = Annotated[int, Field(ge=0, le=1_024)]
Ratio = Annotated[float, Field(ge=1 / 64, le=64)]
PixelValue = Annotated[float, Field(ge=-1_000, le=1_000)]
"""A mean of pixel values, which are 0 to 255."""
Deviation = Annotated[float, Field(ge=0.001, le=10_000)]
"""A standard deviation of pixel values. The pixels are divided by it."""
Weight = Annotated[float, Field(ge=0, le=1_000_000)]
"""A factor, for example of a loss."""


class Config(BaseModel):
    """Base of all configuration: immutable; an unknown key is an error, and so is a number that is NaN or infinite.

    The strings below fields describe them: see `field_descriptions`.
    """

    # pydantic builds what checks a class when that is first used, so that no command waits for all of them.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)
    unwritten: ClassVar[Collection[str]] = ()
    """Later fields, written only where they differ from the default, so that a model keeps its identity."""

    @model_serializer(mode="wrap")
    def _leave_out(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        data = handler(self)
        defaults = {name for name in self.unwritten if getattr(self, name) == fields[name].default}
        return {name: value for name, value in data.items() if name not in defaults}


ConfigT = TypeVar("ConfigT", bound=Config)


def field_descriptions(kind: type[Config]) -> dict[str, str]:
    """Return what the strings below a class's fields, and its bases', say of them, by the field's name.

    pydantic would read them too (`use_attribute_docstrings`), but for every class at its import, which takes longer
    than all else there.
    """
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not (issubclass(base, Config) and base is not Config):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for field, text in itertools.pairwise(body.body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                value = ast.literal_eval(text.value)
                texts[field.target.id] = inspect.cleandoc(value)
    return texts


def dotted_keys(kind: type[Config]) -> Iterator[str]:
    """Yield all keys of a configuration: "loop", "loop.steps", ...; those of a list's members without a number."""
    for name, field in kind.model_fields.items():
        yield name
        for member in configs_in(field.annotation):
            yield from (f"{name}.{key}" for key in dotted_keys(member))


def configs_in(annotation: Any) -> list[type[Config]]:
    """Return the configuration classes in a field's type: X for `X | None`, `list[X]` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [member for part in get_args(annotation) for member in configs_in(part)]
