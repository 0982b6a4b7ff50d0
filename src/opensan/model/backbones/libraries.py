"""Import libraries of other image-text models, only when such a model is built."""

from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn

from opensan.errors import UserError, install


def library(module: str, package: str) -> ModuleType:
    """Import `module` of the Python package `package`. Raises UserError, one line, if it is not installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise
        raise UserError(f"this backbone needs {package}: {install('encoders')}") from None


def timm_model(name: str, **options: Any) -> Any:
    """Build timm's model `name` with random weights. Raises UserError, one line, if timm has none of that name."""
    timm = library("timm", "timm")
    if not timm.is_model(name):
        raise UserError(f"clip.vision.model: timm {timm.__version__} has no model {name!r}")
    try:
        return timm.create_model(name, pretrained=False, **options)
    except (TypeError, AssertionError) as error:  # a model of another kind: timm has no common signature
        raise UserError(f"clip.vision.model: timm's {name} can't serve this kind of backbone ({error})") from None


class Tower(nn.Module):
    """Modules by name, nested as in a library's files."""

    trunk: Any  # a library's module, whose parts torch knows as Tensor | Module only
    head: Any

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
