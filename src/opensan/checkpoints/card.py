"""Write the model card of a hub's repository from the records that lie beside the weights; nothing is made up."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opensan.errors import UserError
from opensan.model import SAN
from opensan.model.identity import model_identity

RECORD_NAME = "training.json"
"""The file beside the weights in which `opensan train` records how they were trained."""

MARK = "<!-- Written by opensan from the records of the training. Without this line, `opensan push` keeps the card. -->"

_METRICS = {"miou": ("mean_iou", "mIoU"), "pixel_accuracy": ("accuracy", "pixel accuracy")}
"""A figure's name in our records -> the hub's name of the metric, and the name for people."""


@dataclass(frozen=True)
class Measured:
    """Figures of a model on one data set."""

    data: str
    """Name of the data set."""
    split: str
    images: int
    figures: Mapping[str, float]
    """Share in [0, 1] by name: those of `_METRICS`, and others, which the card leaves out."""
    repository: str = ""
    """The hub's name of the data set; "" if it is not from there, or not known."""


def read_training(folder: Path, model: SAN) -> dict[str, Any] | None:
    """Return the record of the training that made `folder`'s weights, `model`; None if there is none.

    A record of other weights, which somebody has replaced, is no record. Raises UserError if it can't be read.
    """
    path = folder / RECORD_NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable record of a training ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}: not a record of a training (an object is expected)")
    return record if record.get("model") == str(model_identity(model)) else None


def read_evaluation(folder: Path, model: SAN) -> Measured:
    """Read the results that `opensan eval` wrote for a data set, to `folder`.

    Raises UserError, one line, if there are none, or they are of another model.
    """
    path = folder / "metrics.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        about, figures, images = record["about"], record["metrics"], int(record["images"])
        measured, data, split = str(about["model"]), Path(str(about["data"])).name, str(about["split"])
        shares = {name: float(value) for name, value in figures.items() if value is not None}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: not the results of `opensan eval` for a data set ({type(error).__name__}: {error}); "
            "give the folder that it wrote for one, such as results/street"
        ) from None
    identity = str(model_identity(model))
    if identity not in measured:
        raise UserError(f"{path}: these are figures of {measured}, not of {identity}: measure this model")
    return Measured(data, split, images, shares)


def model_card(
    repository: str,
    model: SAN,
    training: Mapping[str, Any] | None,
    evaluations: Sequence[Measured] = (),
    license: str | None = None,
) -> str:
    """Return the card: YAML for the hub, then Markdown for people.

    Args:
        repository: "owner/name", for the commands.
        model: the weights that the repository holds.
        training: the record of its training (see `read_training`); None: there is none, and the card says so.
        evaluations: what `opensan eval` measured.
        license: the hub's name of the licence; None: the card states none.
    """
    from huggingface_hub import EvalResult, ModelCardData

    try:
        sections = [] if training is None else _training(training)
        measured = [*([] if training is None else _validated(training)), *evaluations]
        words = "road, car, sky" if training is None else ", ".join(training["data"][0]["classes"][:3])
        hub_data = [] if training is None else sorted({each["repository"] for each in training["data"]} - {""})
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise UserError(f"{RECORD_NAME}: not a record of a training ({type(error).__name__}: {error})") from None
    results = [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=each.repository or each.data,
            dataset_name=each.data,
            dataset_split=each.split,
            metric_type=kind,
            metric_name=title,
            metric_value=round(each.figures[name], 6),
        )
        for each in measured
        for name, (kind, title) in _METRICS.items()
        if name in each.figures
    ]
    data = ModelCardData(
        license=license,
        library_name="opensan",
        pipeline_tag="image-segmentation",
        tags=["open-vocabulary", "semantic-segmentation"],
        datasets=hub_data or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=model.config.name if results else None,
        eval_results=results or None,
    )
    lines = ["---", data.to_yaml().strip(), "---", MARK, "", f"# {repository.partition('/')[2]}", ""]
    lines += [
        "Labels every pixel of an image with words chosen at run time: a Side Adapter Network (CVPR 2023) for opensan.",
        "",
        "## Use",
        "",
        "```sh",
        f'opensan segment photo.jpg --words "{words}" --model {repository}',
        "```",
        "",
        "```python",
        "import opensan",
        "",
        f"segmenter = opensan.load({repository!r})",
        f'segmentation = segmenter.segment("photo.jpg", {words!r})',
        "```",
        "",
        "The repository holds numbers (`model.safetensors`) and plain JSON: loading it runs no code of it.",
        "",
        "## Model",
        "",
        *_model(model),
        "",
        "## Training",
        "",
        *(sections or ["No record of a training lies beside these weights."]),
        "",
        "## Measured",
        "",
        *(_figures(measured) or ["Nothing: no validation was recorded and no evaluation given."]),
    ]
    return "\n".join(lines) + "\n"


def _model(model: SAN) -> list[str]:
    config = model.config
    numbers = sum(parameter.numel() for parameter in model.parameters())
    return [
        f"- encoder: {config.clip.kind}, a SAN of {config.side_adapter.queries} mask proposals",
        f"- parameters: {numbers:,}",
        f"- image: the short side is {config.image.short_side} pixels",
        f"- identity: `{model_identity(model)}`, which results name",
    ]


def _training(record: Mapping[str, Any]) -> list[str]:
    start, steps = record["settings"]["start"], record["settings"]["loop"]["steps"]
    lines = [
        f"By opensan {record['opensan']}, {steps:,} steps; these are the weights after step {record['step']:,}.",
        f"It began with `start: {{model: {start['model']}, weights: {start['weights']}, clip: {start['clip']}}}`.",
        "",
        "| data set | list | images | classes | weight |",
        "|---|---|---|---|---|",
    ]
    for each in record["data"]:
        name = f"{each['name']} ({each['repository']})" if each["repository"] else each["name"]
        cells = (_cell(name), _cell(each["split"]), f"{each['images']:,}", len(each["classes"]), each["weight"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for each in record.get("unlabelled", ()):  # records of earlier versions have none
        cells = (_cell(each["name"]), "without labels", f"{each['images']:,}", len(each["classes"]), each["weight"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for each in record["data"]:
        names = ", ".join(f"`{name}`" for name in each["classes"])
        lines += ["", f"Classes of {each['name']}: {names}."]
    settings = yaml.safe_dump(record["settings"], sort_keys=False, allow_unicode=True).rstrip()
    return [*lines, "", "All settings:", "", "```yaml", settings, "```"]


def _validated(record: Mapping[str, Any]) -> list[Measured]:
    held_out = record["validation"]
    if held_out is None or held_out["figures"] is None:
        return []
    figures = {name: value for name, value in held_out["figures"].items() if value is not None}
    return [Measured(held_out["name"], held_out["split"], held_out["images"], figures, held_out["repository"])]


def _figures(measured: Sequence[Measured]) -> list[str]:
    if not measured:
        return []
    titles = [title for _, title in _METRICS.values()]
    lines = [f"| data set | list | images | {' | '.join(titles)} |", "|---|---|---|" + "---|" * len(titles)]
    for each in measured:
        shares = [f"{100 * each.figures[name]:.2f} %" if name in each.figures else "" for name in _METRICS]
        lines.append(f"| {_cell(each.data)} | {_cell(each.split)} | {each.images:,} | {' | '.join(shares)} |")
    return lines


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
