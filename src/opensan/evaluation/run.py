"""Evaluate a model on a prepared data set, with a report and a page: `opensan.evaluate`."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from opensan.distributed import is_main
from opensan.errors import UserError
from opensan.evaluation.evaluation import Evaluation
from opensan.evaluation.measure import measure
from opensan.evaluation.page import write_page
from opensan.evaluation.predictors import AugmentedPredictor, BatchPredictor, ModelPredictor
from opensan.evaluation.report import write_report
from opensan.evaluation.sets import PreparedSet, open_set
from opensan.outputs import check_writable
from opensan.segmenters.base import Segmenter
from opensan.segmenters.load import calibrate, find_calibration, load_with_torch


def facts(model: str, segmenter: Segmenter, tta: bool) -> dict[str, str]:
    """Return facts about the model of an evaluation, for the heads of its files."""
    dtype = str(segmenter.dtype).removeprefix("torch.")
    about = {"model": f"{model} ({segmenter.identity})", "speed": f"{segmenter.speed}, {dtype}"}
    return about | ({"test-time augmentation": "6 scales, mirrored"} if tta else {})


def evaluate_set(
    prepared: PreparedSet,
    predictor: BatchPredictor,
    folder: Path,
    *,
    about: Mapping[str, str],
    batch: int = 1,
    workers: int = 4,
    save_predictions: bool = False,
    confidence: bool = False,
    note: Callable[[str], None] = lambda message: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure a predictor on a data set, and write the report and `index.html` to `folder`.

    `about`: facts about the predictor, for readers. The other arguments are those of `opensan.evaluation.measure`.
    """
    evaluation = measure(
        prepared.dataset,
        predictor,
        folder,
        batch=batch,
        workers=workers,
        save_predictions=save_predictions,
        confidence=confidence,
        note=note,
        progress=progress,
    )
    if is_main():
        title = f"{prepared.name}, {prepared.dataset.split}"
        about = {**about, "data": str(prepared.dataset.root), "split": prepared.dataset.split}
        write_report(evaluation, folder, title=title, about=about)
        write_page(folder, prepared.dataset, predictor, evaluation, title=title, about=about)
    return evaluation


def evaluate(
    data: str | os.PathLike[str],
    model: "Segmenter | str | os.PathLike[str]" = "san-vit-b16",
    *,
    out: str | os.PathLike[str] = "evaluation",
    split: str | None = None,
    batch: int = 1,
    tta: bool = False,
    confidence: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Measure a model on a prepared data set, as `opensan eval` does.

    The figures of every class, the most frequent mistakes and a page of the best and worst images are written to
    `out`/NAME, where NAME is the data set's. A call that was stopped is continued by the same call.

    Args:
        data: a folder that `opensan data prepare` made.
        model: a segmenter that `opensan.load` returned, or what `opensan.load` takes.
        out: the folder for the results.
        split: the list of images; None: the data set's own for evaluation, or "val".
        batch: images of one shape that go through the model together.
        tta: average over 6 scales and mirroring, a dozen times the work.
        confidence: also measure how far confidence can be trusted: `Evaluation.confidence`. Not with `tta`.
        progress: called with the number of images that are done, and of all that are to be.

    Raises:
        ValueError: one line: no such data set, list or model, or a folder that can't be written.
    """
    if confidence and tta:
        raise UserError("confidence is that of single views: leave out tta")
    prepared = open_set(Path(data), split)
    if isinstance(model, Segmenter):
        segmenter = model
    else:
        found = find_calibration(model)
        segmenter = load_with_torch(model)
        calibrate(segmenter, found)
    name = segmenter.identity.name if isinstance(model, Segmenter) else os.fspath(model)
    folder = check_writable(Path(out)) / prepared.name
    predictor = (AugmentedPredictor if tta else ModelPredictor)(segmenter, prepared.dataset.vocabulary)
    about = facts(name, segmenter, tta)
    return evaluate_set(prepared, predictor, folder, about=about, batch=batch, confidence=confidence, progress=progress)
