"""`opensan eval`: evaluate a model on labelled images."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opensan.choices import Adapt
from opensan.cli.asked_words import embed_words
from opensan.cli.objects import Objects, ObjectsBy
from opensan.cli.options import Adapting, AsJson, Calibrated, Device, ImageDtype, Model, Out, Show, SpeedChoice
from opensan.cli.terminal import UsageError, complain, note, open_file, output_console, print_json, progress_of
from opensan.errors import UserError

if TYPE_CHECKING:
    from opensan.evaluation.evaluation import Evaluation
    from opensan.evaluation.objects import ObjectEvaluation
    from opensan.evaluation.predictors import BatchPredictor
    from opensan.evaluation.sets import PreparedSet
    from opensan.segmenters.base import Segmenter

SHOWN = 10
"""Most broken images that are named; metrics.json has all."""


class CategoryIds(StrEnum):
    """Meaning of `category_id` in predictions that are read."""

    contiguous = "contiguous"
    dataset = "dataset"


def evaluate(
    more: Annotated[list[Path] | None, typer.Argument(metavar="[DIR...]", help="More data sets.", hidden=True)] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR...", help="Prepared data sets (`opensan data prepare`).", show_default=False),
    ] = None,
    model: Model = "san-vit-b16",
    calibration: Calibrated = None,
    split: Annotated[
        str | None,
        typer.Option(help="The list of images. Default: the data set's own for this, or val.", show_default=False),
    ] = None,
    tuned: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Words of `opensan tune words`: vectors for the classes.",
            show_default=False,
        ),
    ] = None,
    out: Out = Path("evaluation"),
    device: Device = "auto",
    speed: SpeedChoice = "exact",
    dtype: ImageDtype = None,
    adapt: Adapting = None,
    batch: Annotated[int, typer.Option(min=1, help="Images of one shape that are computed together.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read images and count pixels.")] = 4,
    tta: Annotated[
        bool,
        typer.Option("--tta", help="Average over 6 scales and mirroring: a dozen times the work; not the protocol."),
    ] = False,
    panoptic: Annotated[
        bool, typer.Option("--panoptic", help="Also measure segments: panoptic quality (PQ, SQ, RQ).")
    ] = False,
    instances: Annotated[
        bool, typer.Option("--instances", help="Also measure objects: average precision (AP).")
    ] = False,
    objects: ObjectsBy = "parts",
    confidence: Annotated[
        bool,
        typer.Option("--confidence", help="Also measure how far confidence can be trusted, and what thresholds keep."),
    ] = False,
    save_predictions: Annotated[
        bool, typer.Option("--save-predictions", help="Also write sem_seg_predictions.json (COCO RLE).")
    ] = False,
    from_predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Evaluate a sem_seg JSON or a folder of index PNGs; no model.", show_default=False
        ),
    ] = None,
    category_ids: Annotated[
        CategoryIds,
        typer.Option(help="Meaning of category_id in --from-predictions: the class's index, or the data set's number."),
    ] = CategoryIds.contiguous,
    table: Annotated[
        bool, typer.Option("--table", help="Print the benchmarks' table, official figures beside the measured ones.")
    ] = False,
    root: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With --table: every prepared data set in this folder.", show_default=False),
    ] = None,
    as_json: AsJson = False,
    show: Show = False,
) -> None:
    """Evaluate a model on labelled images.

    Writes for each data set a folder with metrics.json, metrics.md, classes.csv, confusions.csv, images.csv and
    index.html, a page of the best and worst images. The same command continues after an interruption.
    Several devices: torchrun --nproc-per-node N -m opensan eval ...
    """
    folders = [*(data or []), *(more or [])]
    if root is not None and not table:
        raise UsageError("--root belongs to --table; name data sets with --data")
    if not folders and not (table and root):
        raise UsageError("name the data sets: --data DIR..." + (", or --root DIR" if table else ""))
    if from_predictions is not None and len(folders) != 1:
        raise UsageError("--from-predictions is about one data set: give exactly one --data")
    if from_predictions is not None and tta:
        raise UsageError("--tta is about how a model predicts; --from-predictions has no model")
    if from_predictions is not None and (panoptic or instances):
        raise UsageError("--panoptic and --instances need a model; --from-predictions has none")
    if confidence and (tta or from_predictions is not None):
        raise UsageError("--confidence is that of a model's single views: leave out --tta and --from-predictions")
    if calibration is not None and not confidence:
        raise UsageError("--calibration changes no label, so only --confidence measures it: give both")
    if tta and (panoptic or instances):
        raise UsageError("--panoptic and --instances measure single views: leave out --tta")
    if adapt is not None and (tta or panoptic or instances or confidence or from_predictions is not None):
        raise UsageError(
            "--adapt is measured by the labels of single views: leave out --tta, --panoptic, --instances, --confidence "
            "and --from-predictions"
        )
    if from_predictions is not None and tuned is not None:
        raise UsageError("--tuned is about a model's words; --from-predictions has no model")
    from torch import OutOfMemoryError

    from opensan.devices import chosen_device
    from opensan.distributed import is_main, process_group
    from opensan.evaluation.sets import find_sets, open_set
    from opensan.segmenters.load import calibrate, find_calibration, load_with_torch

    with process_group("cpu" if from_predictions else chosen_device(device)) as group:
        if not is_main():
            warnings.simplefilter("ignore")  # the main process shows them
        if root is not None:
            folders += find_sets(root)
        sets = [open_set(folder, split) for folder in folders]
        if tuned is not None:
            _tune(sets, tuned)
        _check_names(sets, out)
        if panoptic or instances:
            for prepared in sets:
                _check_objects(prepared)
        segmenter = None
        found = find_calibration(model, calibration) if confidence else None
        if from_predictions is None:
            if is_main():
                note(f"loading {model}")
            segmenter = load_with_torch(model, device=group.device, speed=speed, dtype=dtype)
            calibrate(segmenter, found)
        run = _Run(
            out=out,
            model=model,
            segmenter=segmenter,
            adapt=adapt,
            tta=tta,
            batch=batch,
            workers=workers,
            save_predictions=save_predictions,
            from_predictions=from_predictions,
            category_ids=category_ids,
            panoptic=panoptic,
            instances=instances,
            objects=objects,
            confidence=confidence,
            quiet=as_json,
        )
        try:
            evaluations = [run.one(prepared) for prepared in sets]
            objects_found = [run.objects_of(prepared) if is_main() else None for prepared in sets]
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on where it was") from None
        except (MemoryError, OutOfMemoryError):
            raise UserError(f"out of memory on {group.device}: try a smaller --batch") from None
        if is_main():
            if table or len(sets) > 1:
                run.table(sets, evaluations)
            if as_json:
                print_json(
                    [
                        run.plain(prepared, evaluation, of_objects)
                        for prepared, evaluation, of_objects in zip(sets, evaluations, objects_found, strict=True)
                    ]
                )
            for prepared in sets if show else ():
                open_file(run.page(prepared))
            _complain_of_broken(sets, evaluations)
    if any(evaluation.broken for evaluation in evaluations):
        raise typer.Exit(1)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """State of one command."""

    out: Path
    model: str
    segmenter: "Segmenter | None"
    adapt: Adapt | None
    tta: bool
    batch: int
    workers: int
    save_predictions: bool
    from_predictions: Path | None
    category_ids: CategoryIds
    panoptic: bool
    instances: bool
    objects: Objects
    confidence: bool
    quiet: bool
    """Whether JSON takes the place of lines and tables on stdout."""

    def page(self, prepared: "PreparedSet") -> Path:
        """Return the path of a data set's page."""
        return self.out / prepared.name / "index.html"

    def plain(
        self, prepared: "PreparedSet", evaluation: "Evaluation", of_objects: "ObjectEvaluation | None"
    ) -> dict[str, Any]:
        """Return the figures of a data set as plain data."""
        more: dict[str, Any] = {} if of_objects is None else {"objects": self._figures(of_objects)}
        if evaluation.confidence is not None:
            more["confidence"] = evaluation.confidence.to_dict()
        return more | {
            "data": prepared.name,
            "split": prepared.dataset.split,
            "images": evaluation.images,
            "metrics": evaluation.metrics.summary(),
            "broken": list(evaluation.broken),
            "page": str(self.page(prepared)),
        }

    @property
    def about(self) -> dict[str, str]:
        """Facts about the evaluation, for the heads of the files."""
        from opensan.evaluation.run import facts

        if self.segmenter is None:
            return {"predictions": str(self.from_predictions)}
        adapted = {} if self.adapt is None else {"adaptation to each image": self.adapt}
        return facts(self.model, self.segmenter, self.tta) | adapted

    def one(self, prepared: "PreparedSet") -> "Evaluation":
        """Evaluate a data set, write its folder, and print its metrics."""
        from opensan.distributed import is_main
        from opensan.evaluation.report import FIGURES, percent
        from opensan.evaluation.run import evaluate_set

        folder = self.out / prepared.name
        console, nothing = output_console(), lambda *_: None
        predictor = self._predictor(prepared)
        with progress_of(console, "evaluating") as progress:
            evaluation = evaluate_set(
                prepared,
                predictor,
                folder,
                about=self.about,
                batch=self.batch,
                workers=self.workers,
                save_predictions=self.save_predictions,
                confidence=self.confidence,
                note=complain if is_main() else nothing,
                progress=progress if is_main() else nothing,
            )
        if is_main() and not self.quiet:
            title = f"{prepared.name}, {prepared.dataset.split}"
            console.print(f"{title}: {evaluation.images:,} images, {self.page(prepared)}", soft_wrap=True)
            for name, value in evaluation.metrics.summary().items():
                console.print(f"  {FIGURES[name]:<32}{percent(value):>7} %")
            if evaluation.confidence is not None:
                console.print(f"  {'calibration error (ECE)':<32}{percent(evaluation.confidence.ece):>7} %")
        return evaluation

    def objects_of(self, prepared: "PreparedSet") -> "ObjectEvaluation | None":
        """Measure segments or objects if that is wanted, write objects.json, and print the figures."""
        if not (self.panoptic or self.instances):
            return None
        from dataclasses import replace

        from opensan.assemble.segments import USUAL_RULES
        from opensan.evaluation.objects import evaluate_objects
        from opensan.evaluation.report import FIGURES, percent
        from opensan.files import json_text, write_text

        assert self.segmenter is not None
        console = output_console()
        rules = replace(USUAL_RULES, parts=self.objects == "parts")
        with progress_of(console, "measuring objects") as progress:
            found = evaluate_objects(self.segmenter, prepared.dataset, rules, progress=progress)
        write_text(self.out / prepared.name / "objects.json", json_text(found.to_dict(), indent=2) + "\n")
        if not self.quiet:
            for name, value in self._figures(found).items():
                console.print(f"  {FIGURES[name]:<32}{percent(value):>7} %")
        return found

    def _figures(self, found: "ObjectEvaluation") -> dict[str, float]:
        return found.summary(panoptic=self.panoptic, instances=self.instances)

    def _predictor(self, prepared: "PreparedSet") -> "BatchPredictor":
        from opensan.evaluation.predictions import SavedPredictions
        from opensan.evaluation.predictors import AugmentedPredictor, ModelPredictor, SavedPredictor

        vocabulary = prepared.dataset.vocabulary
        if self.from_predictions is not None:
            class_of_id = prepared.class_of_id() if self.category_ids is CategoryIds.dataset else None
            predictions = SavedPredictions(self.from_predictions, len(vocabulary.names), class_of_id=class_of_id)
            return SavedPredictor(predictions)
        assert self.segmenter is not None
        embed_words(self.segmenter, vocabulary)
        if self.adapt is not None:
            return ModelPredictor(self.segmenter.adapting(vocabulary, self.adapt), vocabulary)
        return (AugmentedPredictor if self.tta else ModelPredictor)(self.segmenter, vocabulary)

    def table(self, sets: Sequence["PreparedSet"], evaluations: Sequence["Evaluation"]) -> None:
        """Print the table of all data sets, and write it."""
        from opensan.evaluation.table import Measured, as_markdown, missing, table, write_table

        measured = [
            Measured(prepared.name, prepared.label_set, evaluation)
            for prepared, evaluation in zip(sets, evaluations, strict=True)
        ]
        rows = table(measured, self.segmenter.identity.name if self.segmenter else "")
        write_table(rows, self.out, about=self.about)
        if not self.quiet:
            print(as_markdown(rows), end="")
        if absent := missing(measured):
            complain(f"not found, so not measured: {', '.join(absent)} (`opensan data list` says how to prepare them)")


def _check_names(sets: Sequence["PreparedSet"], out: Path) -> None:
    """Raise UsageError if two data sets have the same name, because each gets a folder of its name."""
    from opensan.outputs import check_writable

    names = [prepared.name for prepared in sets]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"two data sets are called {sorted(twice)[0]!r}: measure them with an --out each")
    check_writable(out)


def _tune(sets: Sequence["PreparedSet"], file: Path) -> None:
    """Give the sets' classes the vectors of tuned words. Raises UserError if these are of no class of a set."""
    from dataclasses import replace

    from opensan.word_lists import TunedWords

    words = TunedWords.from_file(file)
    for prepared in sets:
        vocabulary = replace(prepared.dataset.vocabulary, tuned=words)
        if words.context is None and not vocabulary.tuned_rows:
            names = ", ".join(text for text, _ in words.rows)
            raise UserError(f"{file}: has vectors of {names}, and none of them is a class of {prepared.name}")
        prepared.dataset.vocabulary = vocabulary


def _check_objects(prepared: "PreparedSet") -> None:
    """Raise UserError if a data set has no maps of objects."""
    from opensan.data.objects import FOLDER, has_objects

    if not has_objects(prepared.dataset):
        raise UserError(
            f"{prepared.dataset.root}: has no folder {FOLDER}/, which --panoptic and --instances need: prepare it with "
            "a reader that keeps objects (coco-instances, coco-panoptic)"
        )


def _complain_of_broken(sets: Sequence["PreparedSet"], evaluations: Sequence["Evaluation"]) -> None:
    for prepared, evaluation in zip(sets, evaluations, strict=True):
        for reason in evaluation.broken[:SHOWN]:
            complain(f"error: {prepared.name}: {reason}")
        if len(evaluation.broken) > SHOWN:
            complain(f"error: {prepared.name}: {len(evaluation.broken) - SHOWN:,} more; metrics.json names them")
