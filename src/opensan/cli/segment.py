"""`opensan segment`: photographs and words in, label maps, overlays and records out."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from opensan.cli.terminal import INTERRUPTED, UsageError, complain, note, output_console, progress_bar
from opensan.vocabulary import Vocabulary

if TYPE_CHECKING:
    from rich.table import Table

    from opensan.segmenter import ReadImage, Segmentation, Segmenter

TABLE_ROWS = 25
"""A longer table scrolls away what it was asked for; the JSON has the rest."""


class Speed(StrEnum):
    """How the image half is computed."""

    exact = "exact"
    fast = "fast"


class Dtype(StrEnum):
    """What the image half computes with."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass(frozen=True)
class Job:
    """An image, and where its results go."""

    image: Path
    folder: Path
    stem: str


def segment(
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE_OR_FOLDER...", help="Photographs, or folders of them.", show_default=False),
    ],
    words: Annotated[
        str | None,
        typer.Option(help='What to look for: "road, car|automobile|taxi, sky" (| joins synonyms).', show_default=False),
    ] = None,
    words_file: Annotated[
        Path | None, typer.Option(help="The words from a file: a word a line, or JSON.", show_default=False)
    ] = None,
    words_set: Annotated[
        str | None, typer.Option(help="A ready label set; `opensan words` lists them.", show_default=False)
    ] = None,
    background: Annotated[
        str, typer.Option(help="Words whose pixels are reported as unlabelled.", show_default=False)
    ] = "",
    templates: Annotated[
        str | None,
        typer.Option(help="Prompts: vild (the default), single, or a file with one a line.", show_default=False),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="san-vit-b16, san-vit-l14 (official weights, downloaded once), tiny (comes along, works offline, "
            "knows drawn scenes only), a folder, a .safetensors, an official .pth, or a hub id owner/name."
        ),
    ] = "san-vit-b16",
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder for the results.")] = Path("out"),
    formats: Annotated[
        str, typer.Option("--format", metavar="LIST", help="What to write, of: png (label map), overlay, json.")
    ] = "png,overlay,json",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    speed: Annotated[
        Speed, typer.Option(help="fast: about twice as fast where the processor has bfloat16, nearly the same labels.")
    ] = Speed.exact,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the image half's matrices; --speed chooses it if not given.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in memory at a time; more than 1 helps on a GPU.")] = 1,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Larger photographs are refused before they are decoded.")
    ] = 100_000_000,
) -> None:
    """Label every pixel of photographs with words.

    Writes for each image STEM.labels.png (the label map), STEM.overlay.png (with a legend) and STEM.segments.json
    (areas, confidences, COCO masks). Folders keep their structure under --out. A broken image does not stop the
    others; it is listed at the end, and the exit code is 1.
    """
    vocabulary = _vocabulary(words, words_file, words_set, background, templates)
    from opensan import outputs  # imported only now, like all that --help can do without

    kinds = [kind.strip() for kind in formats.split(",") if kind.strip()]
    try:
        outputs.check_formats(kinds)
    except ValueError as error:
        raise UsageError(f"--format: {error}") from None
    outputs.check_writable(out)

    from torch import OutOfMemoryError

    from opensan.images import list_images
    from opensan.segmenter import load

    jobs = plan(_without_results(list_images(images), images, out), images, out)
    note(f"loading {model}")
    segmenter = load(model, device=device, speed=speed.value, dtype=dtype and dtype.value, max_pixels=max_pixels)
    segmenter.text.classifier(vocabulary)  # before the images: it may take long, and it finds words that do not fit
    try:
        _Run(segmenter, vocabulary, kinds, out, batch).all(jobs)
    except (MemoryError, OutOfMemoryError):
        raise ValueError(f"out of memory on {device}: try a smaller --batch, or smaller photographs") from None


class _Run:
    """Segments one command's images, a batch at a time; while one is computed and written, the next one is read."""

    def __init__(
        self,
        segmenter: "Segmenter",
        vocabulary: Vocabulary,
        formats: Sequence[str],
        out: Path,
        batch: int,
    ) -> None:
        self._segmenter = segmenter
        self._vocabulary = vocabulary
        self._formats = formats
        self._out = out
        self._batch = batch
        self._done = 0
        self._broken: list[str] = []
        self._console = output_console()

    def all(self, jobs: Sequence[Job]) -> None:
        """Exits with 1 if an image was broken, with 130 on Ctrl-C; what is written by then stays."""
        try:
            with progress_bar(self._console, "segmenting", len(jobs)) as advance:
                for part in self._read(jobs):
                    self._segment([read for read in part if isinstance(read, tuple)], alone=len(jobs) == 1)
                    self._broken += [reason for reason in part if isinstance(reason, str)]
                    advance(len(part))
                    part.clear()  # two batches are in memory, not three: the one in use and the one being read
        except KeyboardInterrupt:
            complain(f"interrupted: {self._done} of {len(jobs)} images done, their files are complete in {self._out}")
            raise typer.Exit(INTERRUPTED) from None
        if len(jobs) > 1:
            self._console.print(f"{self._done} of {len(jobs)} images done, results in {self._out}", soft_wrap=True)
        if self._broken:
            for reason in self._broken:
                complain(f"error: {reason}")
            raise typer.Exit(1)

    def _read(self, jobs: Sequence[Job]) -> "Iterator[list[tuple[Job, ReadImage] | str]]":
        """Batches of images, or of the reasons why they cannot be read; each is read while the one before is in use."""
        from opensan.images import ImageError

        def read(part: Sequence[Job]) -> "list[tuple[Job, ReadImage] | str]":
            return [read_one(job) for job in part]

        def read_one(job: Job) -> "tuple[Job, ReadImage] | str":
            try:
                return job, self._segmenter.read(job.image)
            except ImageError as error:
                return str(error)

        parts = [jobs[start : start + self._batch] for start in range(0, len(jobs), self._batch)]
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(read, parts[0])
            for part in [*parts[1:], []]:
                done, ahead = ahead.result(), reader.submit(read, part)
                yield done

    def _segment(self, images: "Sequence[tuple[Job, ReadImage]]", *, alone: bool) -> None:
        encodings = self._segmenter.encode_read([image for _, image in images], batch_size=self._batch)
        for (job, _), encoding in zip(images, encodings, strict=True):
            self._write(job, self._segmenter.segment(encoding, self._vocabulary), alone=alone)

    def _write(self, job: Job, segmentation: "Segmentation", *, alone: bool) -> None:
        paths = segmentation.save(job.folder, job.stem, self._formats)
        self._done += 1
        if alone:
            self._console.print(_table(segmentation))
            for path in paths.values():
                self._console.print(f"wrote {path}", soft_wrap=True)
        else:
            self._console.print(f"{job.image}: {_summary(segmentation)}", soft_wrap=True)


def _vocabulary(
    words: str | None, words_file: Path | None, words_set: str | None, background: str, templates: str | None
) -> Vocabulary:
    given = {"--words": words, "--words-file": words_file, "--words-set": words_set}
    if sum(value is not None for value in given.values()) != 1:
        raise UsageError(f"give the words by exactly one of {', '.join(given)}")
    if words_file is not None:
        return Vocabulary.from_file(words_file, background=background, templates=templates)
    if words_set is not None:
        return Vocabulary.ready(words_set, background=background, templates=templates)
    return Vocabulary.parse(words, background=background, templates=templates)


def plan(images: Sequence[Path], arguments: Sequence[Path], out: Path) -> list[Job]:
    """Where each image's results go: folders as they are below what the command named, and no two names alike.

    Named are folders, and files' folders; with several, the folder common to all of them is the top.
    An image's stem names its results; images of one folder that differ only in suffix keep it ("x.jpg.labels.png").
    """
    tops = {_absolute(path if path.is_dir() else path.parent) for path in arguments}
    top = os.path.commonpath(tops)
    places = [(_absolute(image).parent.relative_to(top), image) for image in images]
    stems = Counter((folder, image.stem) for folder, image in places)
    names = [(folder, image.stem if stems[folder, image.stem] == 1 else image.name) for folder, image in places]
    if len(set(names)) < len(names):  # "x.jpg", "x.png" and "x.jpg.png"
        names = [(folder, image.name) for folder, image in places]
    return [Job(image, out / folder, name) for image, (folder, name) in zip(images, names, strict=True)]


def _without_results(images: Sequence[Path], arguments: Sequence[Path], out: Path) -> list[Path]:
    """Leaves out an earlier run's pictures, which lie among the images when --out lies in a folder to segment."""
    from opensan.outputs import FORMATS

    named = {_absolute(path) for path in arguments}
    inside = _absolute(out)
    if inside in named:  # the results go among the photographs themselves
        ours = tuple(FORMATS.values())
        return [image for image in images if not image.name.endswith(ours) or _absolute(image) in named]
    kept = [image for image in images if _absolute(image) in named or not _absolute(image).is_relative_to(inside)]
    if not kept:
        raise ValueError(f"no images but the results of an earlier run, in {out}")
    return kept


def _absolute(path: Path) -> Path:
    """Without "." and "..", but links are kept: a linked photograph is named by its link."""
    return Path(os.path.normpath(path.absolute()))


def _table(segmentation: "Segmentation") -> "Table":
    """The words that occur, largest first."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from opensan import outputs

    confidences = outputs.mean_confidence(segmentation.labels, segmentation.confidence, len(segmentation.names))
    found = [
        (name, area, confidence)
        for (name, area), confidence in zip(segmentation.areas.items(), confidences, strict=True)
        if confidence is not None
    ]
    found.sort(key=lambda row: -row[1])
    table = Table(box=box.SIMPLE)
    table.add_column("word")
    table.add_column("area", justify="right")
    table.add_column("confidence", justify="right")
    for name, area, confidence in found[:TABLE_ROWS]:
        table.add_row(Text(name), outputs.format_share(area), f"{confidence:.2f}")
    if len(found) > TABLE_ROWS:
        rest = sum(area for _, area, _ in found[TABLE_ROWS:])
        table.add_row(f"and {len(found) - TABLE_ROWS} more", outputs.format_share(rest), "")
    if unlabelled := float((segmentation.labels < 0).mean()):
        table.add_row("unlabelled", outputs.format_share(unlabelled), "")
    return table


def _summary(segmentation: "Segmentation") -> str:
    """The three largest words, and what no word got."""
    from opensan.outputs import format_share

    areas = sorted(segmentation.areas.items(), key=lambda item: -item[1])
    found = [f"{name} {format_share(area)}" for name, area in areas[:3] if area > 0]
    if unlabelled := float((segmentation.labels < 0).mean()):
        found.append(f"unlabelled {format_share(unlabelled)}")
    return ", ".join(found)
