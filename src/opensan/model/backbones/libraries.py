"""The libraries that foreign image-text models are written in, imported only when such a model is asked for."""

from importlib import import_module
from types import ModuleType

from opensan.errors import UserError


def library(module: str, package: str) -> ModuleType:
    """Import `module` of the Python package `package`. Raises UserError, one line, if it is not installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != module.split(".")[0]:
            raise
        raise UserError(f"this backbone needs {package}: pip install 'opensan[encoders]'") from None
