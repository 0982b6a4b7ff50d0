"""An exported model on disk: a folder of graphs, config.json as any checkpoint has it, and export.json."""

import json
from pathlib import Path
from typing import Literal

from opensan.config import CONFIG_NAME, EXPORT_NAME, Config, ModelConfig, parse_config, read_config
from opensan.errors import UserError


class ExportManifest(Config):
    """What export.json says."""

    format: Literal["onnx", "openvino", "torch"]
    dtype: Literal["float32", "float16", "bfloat16", "int8"]
    """Of the weights."""
    image: str
    """Identity of the image half: encodings of other models are refused."""
    text: bool
    """Whether the text tower is here."""
    text_tower: str
    """Identity of the text tower as it was exported."""
    seen_tokens: tuple[int, ...] | None = None
    """The tokens that the model was trained on; None: all."""
    version: Literal[2] = 2


def exported_folder(source: object) -> Path | None:
    """The folder of an exported model that `source` names (itself, or a graph in it); None for anything else."""
    if not isinstance(source, str | Path):
        return None
    path = Path(source).expanduser()
    folder = path.parent if path.suffix in (".onnx", ".xml", ".pt2") else path
    return folder if (folder / EXPORT_NAME).is_file() else None


def read_folder(folder: Path) -> tuple[ModelConfig, ExportManifest]:
    """Raises ValueError, one line, when either file is damaged."""
    path = folder / EXPORT_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable export description ({error})") from None
    return read_config(folder / CONFIG_NAME), parse_config(ExportManifest, data, str(path))
