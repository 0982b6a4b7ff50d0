"""Record how a model was trained, beside its weights: what a model card is written from."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opensan import __version__
from opensan.checkpoints.card import RECORD_NAME
from opensan.data.canonical import read_manifest
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.data.shards import ShardedSet
from opensan.data.unlabelled import UnlabelledFolder
from opensan.errors import UserError
from opensan.files import json_text, write_text
from opensan.model import SAN
from opensan.model.identity import model_identity
from opensan.recipe.config import RecipeConfig

_OF_THE_MACHINE = ("out", "loggers", "project", "device")
"""Settings that say nothing about the model."""


def write_record(
    model: SAN,
    recipe: RecipeConfig,
    step: int,
    data: Sequence[tuple[SegmentationFolder | ShardedSet, float]],
    unlabelled: Sequence[tuple[UnlabelledFolder, float]],
    held_out: SegmentationFolder | ShardedSet | None,
) -> None:
    """Write the record to the folder of the saved `model`, the weights after `step`.

    It names folders without the way to them, because it is made to be shown to others.
    """
    record = {
        "opensan": __version__,
        "model": str(model_identity(model)),
        "step": step,
        "data": [{**_facts(folder), "weight": weight} for folder, weight in data],
        "unlabelled": [
            {
                "name": folder.root.absolute().name,
                "images": len(folder),
                "classes": folder.vocabulary.names,
                "weight": weight,
            }
            for folder, weight in unlabelled
        ],
        "validation": None,
        "settings": _settings(recipe),
    }
    if held_out is not None and recipe.validation is not None:
        images = min(len(held_out), recipe.validation.limit or len(held_out))
        figures = _validated(recipe.out / "validation.csv", step)
        record["validation"] = _facts(held_out) | {"images": images, "figures": figures}
    write_text(recipe.out / "model" / RECORD_NAME, json_text(record) + "\n")


def _facts(folder: SegmentationFolder | ShardedSet) -> dict[str, Any]:
    try:
        manifest = read_manifest(folder.root)
    except UserError:  # the training did not need it
        manifest = None
    from_hub = manifest is not None and manifest.request.source == "huggingface"
    return {
        "name": folder.root.absolute().name,
        "split": folder.split,
        "images": len(folder),
        "classes": folder.vocabulary.names,
        "repository": manifest.request.options.get("repo", "") if manifest is not None and from_hub else "",
    }


def _settings(recipe: RecipeConfig) -> dict[str, Any]:
    data = recipe.model_dump(mode="json")
    for name in _OF_THE_MACHINE:
        data.pop(name)
    if not data["unlabelled"]:
        del data["self_training"]
    for folder in data["unlabelled"]:
        if isinstance(folder["words"], str):
            folder["words"] = Path(folder["words"]).name
    for folder in (*data["data"], *data["unlabelled"], *([data["validation"]] if data["validation"] else [])):
        folder["folder"] = Path(folder["folder"]).absolute().name
    for name in ("model", "clip"):
        path = Path(data["start"][name]).expanduser()
        if path.exists():
            data["start"][name] = path.absolute().name
    return data


def _validated(path: Path, step: int) -> Mapping[str, float] | None:
    """Return the figures of the validation after `step`; None if there was none then."""
    if not path.exists():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row.get("step") == str(step):
                return {name: float(value) for name, value in row.items() if name != "step" and value}
    return None
