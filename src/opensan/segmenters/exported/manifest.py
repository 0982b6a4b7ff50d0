"""Read an exported model's folder: graphs, config.json as in checkpoints, and export.json."""

import json
from pathlib import Path
from typing import Literal

from opensan.choices import ExportDtype, ExportFormat
from opensan.config import CONFIG_NAME, EXPORT_NAME, Config, ModelConfig, parse_config, read_config
from opensan.errors import UserError


class ExportManifest(Config):
    """Content of export.json."""

    format: ExportFormat
    dtype: ExportDtype
    """Precision of the weights."""
    image: str
    """Identity of the image half: encodings of other models are refused."""
    text: bool
    """Whether the folder holds the text tower."""
    text_tower: str
    """Identity of the text tower at export."""
    seen_tokens: tuple[int, ...] | None = None
    """Tokens that the model was trained on; None for all."""
    version: Literal[2] = 2


def exported_folder(source: object) -> Path | None:
    """Return the folder of an exported model, which `source` or its parent is; None for anything else."""
    if not isinstance(source, str | Path):
        return None
    path = Path(source).expanduser()
    folder = path.parent if path.suffix in (".onnx", ".xml", ".pt2") else path
    return folder if (folder / EXPORT_NAME).is_file() else None


def read_folder(folder: Path) -> tuple[ModelConfig, ExportManifest]:
    """Read both configuration files. Raises UserError, one line, if either is damaged."""
    path = folder / EXPORT_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable export description ({error})") from None
    return read_config(folder / CONFIG_NAME), parse_config(ExportManifest, data, str(path))
