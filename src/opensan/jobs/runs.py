"""Label a whole folder or video in one call: `opensan.label_folder` and `opensan.label_video`."""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from opensan import outputs
from opensan.assemble.calibration import checked_threshold
from opensan.assemble.kinds import word_kinds
from opensan.assemble.segments import USUAL_RULES, SegmentRules
from opensan.buckets import bucket_path
from opensan.errors import UserError, install, reason
from opensan.files import absolute, check_regular
from opensan.images import list_images
from opensan.jobs.folder import Broken, FolderRun, Job, Written, plan, without_results
from opensan.segmenters.base import Segmenter
from opensan.segmenters.load import load
from opensan.vocabulary import Templates, Vocabulary

Model: TypeAlias = "Segmenter | str | os.PathLike[str]"
"""A segmenter that `opensan.load` returned, or what `opensan.load` takes."""


@dataclass
class FolderResults:
    """Result of `label_folder`."""

    out: Path
    """The folder with the results."""
    written: list[Written] = field(default_factory=list)
    """The images of this call whose files are complete: `written[0].job.image`, `written[0].areas`."""
    broken: list[Broken] = field(default_factory=list)
    """The images that can't be read, or whose results can't be written, each with the reason."""
    earlier: int = 0
    """Number of images that an earlier call completed."""


def plan_folder(images: Sequence[Path], out: Path, formats: Sequence[str]) -> list[Job]:
    """List the images of files and folders, and plan their results' paths. Raises UserError, one line.

    A single "@FILE" is a list of images: see `read_list`. Those that are missing are found broken by the run.
    """
    images = [bucket_path(path) or path for path in images]
    lists = [path for path in images if str(path).startswith("@") and not path.exists()]
    if lists and len(images) > 1:
        raise UserError(f"{lists[0]}: a list of images stands alone")
    if lists:
        listed = read_list(Path(str(lists[0])[1:]))
        return plan(listed, listed)
    datasets = [name for name in formats if name in outputs.DATASETS]
    if datasets and absolute(out) in map(absolute, images):
        raise UserError(
            f"{out}: {datasets[0]} links to the images, so it can't be in their folder; choose another folder"
        )
    return plan(without_results(list_images(images), images, out), images)


def read_list(file: Path) -> list[Path]:
    """Read a list of images, each once: text with a path a line, or a parquet file with a column "path" or "image".

    Paths are relative to the current folder, or addresses in buckets. Raises UserError, one line, if it can't be read
    or names nothing.
    """
    check_regular(file)
    try:
        if file.suffix == ".parquet":
            names = _column(file)
        else:
            names = [os.fsdecode(line) for line in file.read_bytes().splitlines()]
    except OSError as error:
        raise UserError(f"{file}: the list of images can't be read ({reason(error)})") from None
    paths = [bucket_path(name) or Path(name) for name in dict.fromkeys(names) if name.strip()]
    if not paths:
        raise UserError(f"{file}: the list names no images")
    return paths


def _column(file: Path) -> list[str]:
    """Return the column "path", or else "image", of a parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file}: parquet needs pyarrow: {install('huggingface')}") from None
    try:
        schema = pyarrow.parquet.read_schema(file)
        text = (pyarrow.string(), pyarrow.large_string())
        column = next((name for name in ("path", "image") if name in schema.names), "")
        if not column or schema.field(column).type not in text:
            raise UserError(f'{file}: has no column "path" or "image" of text')
        names = pyarrow.parquet.read_table(file, columns=[column])[column].to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: not a parquet file ({reason(error)})") from None
    return [name for name in names if name is not None]


def label_folder(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    words: Any,
    *,
    model: Model = "san-vit-b16",
    out: str | os.PathLike[str] = "out",
    formats: Sequence[str] = ("png", "overlay", "json"),
    background: Iterable[Any] = (),
    templates: Templates | None = None,
    segments: SegmentRules = USUAL_RULES,
    threshold: float = 0.0,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> FolderResults:
    """Label all images of a folder, in memory that does not grow with their number, as `opensan segment FOLDER` does.

    Images that an earlier call completed with the same model and words are not labelled again.

    Args:
        images: a folder, which is searched with its sub-folders; an image; or a list of either.
        words: as for `Segmenter.segment`; so are `background` and `templates`.
        model: a segmenter that `opensan.load` returned, or what `opensan.load` takes.
        out: the folder for the results.
        formats: of "png", "overlay", "json", "panoptic", "boxes"; and data sets of all images, of regions ("coco",
            "yolo", "voc", "labelstudio") or of objects ("coco-instances", "coco-panoptic",
            "labelstudio-panoptic", "yolo-instances", "yolo-boxes").
        segments: the rules of objects, for the formats that are made of them.
        threshold: pixels of less confidence stay unlabelled, from 0 to 1.
        batch: images of one shape that go through the model together.
        progress: called with the number of images that are done, and of all.

    Raises:
        ValueError: one line: unusable words, no images, or a folder that can't be written. A broken image stops
            nothing: it is in the result's `broken`, and a warning counts them.
    """
    paths = [Path(path) for path in (images if isinstance(images, list | tuple) else [images])]  # type: ignore[arg-type]
    vocabulary = Vocabulary.parse(words, background=background, templates=templates)
    threshold = checked_threshold(threshold)
    word_kinds(vocabulary, segments.stuff, segments.things)  # a wrong word is reported before the work
    results = FolderResults(Path(out))
    jobs = plan_folder(paths, results.out, formats)
    segmenter = _segmenter(model)
    segmenter.prepare_words(vocabulary)
    with FolderRun(
        segmenter, vocabulary, jobs, results.out, formats, batch=batch, rules=segments, threshold=threshold
    ) as run:
        for note in run.notes:
            warnings.warn(note, stacklevel=2)
        results.earlier = len(jobs) - len(run.pending)
        with closing(run.results()) as finished:
            for done, result in enumerate(finished, results.earlier + 1):
                if isinstance(result, Broken):
                    results.broken.append(result)
                else:
                    results.written.append(result)
                if progress:
                    progress(done, len(jobs))
    if results.broken:
        first = results.broken[0].reason
        warnings.warn(f"{len(results.broken)} of {len(jobs)} images are not done, the first: {first}", stacklevel=2)
    return results


@dataclass
class VideoResults:
    """Result of `label_video`."""

    overlay: Path
    """The video under its words' colours."""
    labels: Path
    """The folder with a label map for each frame."""
    table: Path
    """A CSV file with the time and each word's share of every frame."""
    frames: int
    """Number of labelled frames."""
    areas: dict[str, float]
    """Each word's share of all pixels of all frames, in [0, 1]."""


def label_video(
    video: str | os.PathLike[str],
    words: Any,
    *,
    model: Model = "san-vit-b16",
    out: str | os.PathLike[str] = "out",
    background: Iterable[Any] = (),
    templates: Templates | None = None,
    every: int = 1,
    steady: bool = True,
    threshold: float = 0.0,
    batch: int = 1,
    progress: Callable[[int, int | None], None] | None = None,
) -> VideoResults:
    """Label every frame of a video, in memory that does not grow with its length, as `opensan segment-video` does.

    A call that was stopped is continued by the same call. Needs the extra `video`.

    Args:
        video: a file that FFmpeg reads.
        words: as for `Segmenter.segment`; so are `background` and `templates`.
        model: a segmenter that `opensan.load` returned, or what `opensan.load` takes.
        out: the folder for the results.
        every: label each `every`-th frame only.
        steady: keep labels from flickering, by the frames before.
        threshold: pixels of less confidence stay unlabelled, from 0 to 1.
        batch: frames that go through the model together.
        progress: called with the number of frames that are done, and of all (None if the file does not tell).

    Raises:
        ValueError: one line: unusable words, a file that is no video, or a folder that can't be written.
    """
    from opensan.jobs.video import VideoRun

    threshold = checked_threshold(threshold)
    vocabulary = Vocabulary.parse(words, background=background, templates=templates)
    segmenter = _segmenter(model)
    segmenter.prepare_words(vocabulary)
    clip, folder = Path(video), Path(out)
    with VideoRun(
        segmenter, vocabulary, clip, folder, every=every, steady=steady, batch=batch, threshold=threshold
    ) as run:
        for note in run.notes:
            warnings.warn(note, stacklevel=2)
        run.notes.clear()
        with closing(run.results()) as frames:
            for _ in frames:
                if progress:
                    progress(run.done, run.count)
        for note in run.notes:
            warnings.warn(note, stacklevel=2)
        return VideoResults(*run.paths, run.done, run.areas)


def _segmenter(model: Model) -> Segmenter:
    return model if isinstance(model, Segmenter) else load(model)
