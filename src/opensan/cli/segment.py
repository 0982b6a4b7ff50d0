"""`opensan segment`: label images and write label maps, overlays and records."""

import re
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opensan.cli.asked_words import (
    Background,
    Rest,
    Templates,
    Words,
    WordsFile,
    WordsSet,
    asked_vocabulary,
    embed_words,
    vocabularies,
)
from opensan.cli.many_machines import Address, On, PerGpu, Workers, check_engine, loading_of, running_on_ray
from opensan.cli.objects import (
    LeastMask,
    LeastOverlap,
    LeastScore,
    ObjectsBy,
    Stuff,
    Things,
    asked_rules,
    has_segments,
    segments_table,
)
from opensan.cli.options import (
    RESULTS,
    Adapting,
    AsJson,
    Calibrated,
    Device,
    ImageDtype,
    Model,
    Out,
    Show,
    SpeedChoice,
    Threshold,
    checked_threshold,
    listed_formats,
    say_what_tiny_knows,
)
from opensan.cli.terminal import (
    SMALLER,
    UsageError,
    complain,
    note,
    open_file,
    output_console,
    print_json,
    progress_bar,
    telling_of_memory,
)
from opensan.cli.word_table import word_table
from opensan.errors import UserError

STDIN = Path("-")

if TYPE_CHECKING:
    from rich.table import Table

    from opensan.jobs.folder import FolderRun, Job, Question, Written
    from opensan.segmenters.base import Segmenter
    from opensan.segmenters.results import Segmentation


def segment(
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE_OR_FOLDER...",
            help="Images, or folders of images; @FILE is a list of them (a path a line, or parquet); - is an image on "
            "stdin, or with --lines a stream of them.",
            show_default=False,
        ),
    ],
    words: Words = None,
    words_file: WordsFile = None,
    words_set: WordsSet = None,
    background: Background = None,
    templates: Templates = None,
    rest: Rest = False,
    model: Model = "san-vit-b16",
    calibration: Calibrated = None,
    out: Out = Path("out"),
    threshold: Threshold = 0.0,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="LIST",
            help="What to write, of: png (label map), overlay, json (these three are the default), panoptic (numbers "
            "of objects), boxes (objects as JSON); and as data sets of all: coco, yolo, voc, labelstudio (regions), "
            "coco-instances, coco-panoptic, labelstudio-panoptic, yolo-instances, yolo-boxes (objects). With commas "
            "between, or given several times. With --lines: rle (masks in the answers, the default), or files.",
            show_default=False,
            rich_help_panel=RESULTS,
        ),
    ] = None,
    stuff: Stuff = None,
    things: Things = None,
    objects: ObjectsBy = "parts",
    least_score: LeastScore = 0.0,
    least_mask: LeastMask = 0.5,
    least_overlap: LeastOverlap = 0.8,
    device: Device = "auto",
    speed: SpeedChoice = "exact",
    dtype: ImageDtype = None,
    adapt: Adapting = None,
    batch: Annotated[
        int, typer.Option(min=1, help="Images computed together, if their shapes agree; more than 1 helps on a GPU.")
    ] = 1,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Larger images are refused before they are decoded.")
    ] = 100_000_000,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="X,Y",
            help="Also draw why the pixel in column X and row Y got its word (STEM.explained.png); for one image.",
            show_default=False,
            rich_help_panel=RESULTS,
        ),
    ] = None,
    lines: Annotated[
        bool,
        typer.Option(
            "--lines",
            help='Answer lines of JSON on stdin, {"image": ..., "id": ..., "words": ...}, by lines of JSON, in order, '
            "until stdin ends; for -.",
        ),
    ] = False,
    on: On = None,
    workers: Workers = None,
    workers_per_gpu: PerGpu = 1,
    address: Address = None,
    as_json: AsJson = False,
    show: Show = False,
) -> None:
    """Label every pixel of images with words.

    Writes for each image STEM.labels.png (the label map), STEM.overlay.png (with a legend) and STEM.segments.json
    (areas, confidences, COCO masks). Folders keep their structure under --out. A broken image does not stop the
    others; it is listed at the end, and the exit code is 1. Results are noted in manifest.sqlite: a stopped run of
    several images goes on with the same command, and what is done is not done again.
    """
    checked_threshold(threshold)
    alone = {"--lines": lines, "--show": show, "--explain": explain, "--adapt": adapt, "-": STDIN in images}
    check_engine(on, workers, address, workers_per_gpu, alone)
    if lines:
        if images != [STDIN] or show or explain is not None:
            raise UsageError("--lines answers a stream: give - in place of images, and neither --show nor --explain")
        if adapt is not None:
            raise UsageError("--adapt is about one list of words, and each line may have its own: leave out --lines")
        from opensan.cli.lines import answer_lines, formats_of_lines

        kinds = formats_of_lines(formats)
        default = None
        if words or words_file or words_set:
            default = asked_vocabulary(words, words_file, words_set, background, templates, rest)
        rules = asked_rules(default, kinds, stuff, things, objects, least_score, least_mask, least_overlap)
        from opensan.jobs.lines import LineQuestion
        from opensan.segmenters.load import load

        note(f"loading {model}")
        segmenter = load(model, device=device, speed=speed, dtype=dtype, max_pixels=max_pixels, calibration=calibration)
        parse = vocabularies(background, templates)
        stream = LineQuestion(parse, default, out, tuple(kinds), rules, threshold)
        answer_lines(segmenter, stream, rest=rest, batch=batch)
        return
    vocabulary = asked_vocabulary(words, words_file, words_set, background, templates, rest)
    from opensan import outputs  # imported here, like all that --help does not need

    kinds = listed_formats(formats if formats is not None else ["png,overlay,json"])
    try:
        outputs.check_formats_of_many(kinds, len(vocabulary.names))
    except UserError as error:
        raise UsageError(f"--format: {error}") from None
    rules = asked_rules(vocabulary, kinds, stuff, things, objects, least_score, least_mask, least_overlap)
    outputs.check_writable(out)

    from opensan.jobs.folder import FolderRun, Job, Question
    from opensan.jobs.runs import plan_folder
    from opensan.segmenters.load import load

    datasets = [kind for kind in kinds if kind in outputs.DATASETS]
    stdin = STDIN in images
    if stdin and (len(images) > 1 or datasets):
        raise UsageError("- (an image on stdin) stands alone, and is part of no data set")
    jobs = [Job(STDIN, "stdin")] if stdin else plan_folder(images, out, kinds)
    single = len(jobs) == 1 and not datasets
    if show and not (single and "overlay" in kinds):
        raise UsageError("--show opens the overlay of a single image: give one image, and overlay among --format")
    pixel = None if explain is None else _pixel(explain, jobs, single)
    if workers is not None:
        question = Question(vocabulary, out, tuple(dict.fromkeys(kinds)), rules, threshold)
        loading = loading_of(model, device, speed, dtype, max_pixels, calibration)
        with running_on_ray(workers, address, loading, question, rest, jobs, batch, workers_per_gpu) as run:
            label_many(run, len(jobs), out, as_json)
        return
    note(f"loading {model}")
    say_what_tiny_knows(model, [job.image for job in jobs])
    segmenter = load(model, device=device, speed=speed, dtype=dtype, max_pixels=max_pixels, calibration=calibration)
    embed_words(segmenter, vocabulary)
    if adapt is not None:
        segmenter = segmenter.adapting(vocabulary, adapt)
    if rest:
        vocabulary = segmenter.with_rest(vocabulary)
    with telling_of_memory(segmenter.device, SMALLER):
        if single:
            question = Question(vocabulary, out, tuple(dict.fromkeys(kinds)), rules, threshold)
            paths = _one(segmenter, question, jobs[0], as_json, pixel)
            if show:
                open_file(paths["overlay"])
        else:
            run = FolderRun(segmenter, vocabulary, jobs, out, kinds, batch=batch, rules=rules, threshold=threshold)
            label_many(run, len(jobs), out, as_json)


def _pixel(text: str, jobs: Sequence["Job"], single: bool) -> tuple[int, int]:
    """Return the pixel of --explain. Raises UsageError if it is none of the image."""
    from opensan.images import image_size

    match = re.fullmatch(r"\s*(\d{1,9})\s*,\s*(\d{1,9})\s*", text)
    if match is None:
        raise UsageError(f"--explain {text}: must be a column and a row, such as 120,80")
    if not single:
        raise UsageError("--explain is about one image: give one, and no data set as --format")
    x, y = int(match[1]), int(match[2])
    if jobs[0].image.is_file():
        height, width = image_size(jobs[0].image)
        if x >= width or y >= height:
            raise UsageError(f"--explain: pixel ({x}, {y}) is outside the image of {width} x {height}")
    return x, y


def _one(
    segmenter: "Segmenter", question: "Question", job: "Job", as_json: bool, pixel: tuple[int, int] | None
) -> dict[str, Path]:
    """Segment a single image, print its words as a table, and return its files."""
    from opensan.jobs.folder import label_single
    from opensan.outputs import output_paths

    if job.image.is_file():
        segmentation, written = label_single(segmenter, question, job, complain)
        base = question.out / written.job.stem
        paths = output_paths(base.parent, base.name, question.formats)
    else:  # stdin or a pipe, which can be read only once
        image = sys.stdin.buffer.read() if job.image == STDIN else job.image
        segmentation = question.label(segmenter, image)
        base = question.out / job.stem
        paths = segmentation.save(base.parent, base.name, question.formats)
    if pixel is not None:
        from opensan.files import atomic_path

        picture = segmentation.explained_picture(*pixel)
        paths["explained"] = base.parent / f"{base.name}.explained.png"
        with atomic_path(paths["explained"]) as temporary:
            picture.save(temporary)
    if as_json:
        unlabelled = float((segmentation.labels < 0).mean())
        files = [str(path) for path in paths.values()]
        line = _plain(job.image, segmentation.areas, unlabelled, files) | {
            "confidence": segmentation.about_confidence()
        }
        if has_segments(question.formats):
            line |= segmentation.segments.to_dict()
        print_json(line, indent=None)
        return paths
    console = output_console()
    console.print(_table(segmentation))
    if question.threshold:
        share = f"{100 * segmentation.below_threshold:.1f} %"
        console.print(f"unlabelled for a confidence below {question.threshold:g}: {share} of the pixels")
    if has_segments(question.formats):
        console.print(segments_table(segmentation.segments))
    for path in paths.values():
        console.print(f"wrote {path}", soft_wrap=True)
    return paths


def _plain(image: Path, areas: dict[str, float], unlabelled: float, files: Sequence[str]) -> dict[str, Any]:
    """Return an image's line of JSON."""
    return {"image": str(image), "areas": areas, "unlabelled": unlabelled, "files": list(files)}


def label_many(run: "FolderRun", count: int, out: Path, as_json: bool) -> None:
    """Segment many images, with a line an image on stdout, of JSON if wanted.

    Exits with 1 if an image was broken, with 130 on Ctrl-C; written files stay.
    """
    from opensan.jobs.folder import Broken

    console = output_console()
    broken: list[str] = []
    with run:
        for line in run.notes:
            complain(line)
        earlier = count - len(run.pending)
        done = earlier
        try:
            with progress_bar(console, "segmenting", len(run.pending)) as advance, closing(run.results()) as results:
                for result in results:
                    if isinstance(result, Broken):
                        broken.append(result.reason)
                    else:
                        done += 1
                        if as_json:
                            files = [str(out / path) for path in result.record.files]
                            print_json(_plain(result.job.image, result.areas, result.unlabelled, files), indent=None)
                        else:
                            console.print(f"{result.job.image}: {_summary(result)}", soft_wrap=True)
                    advance(1)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{done} of {count} images done, their files are complete in {out}; the same command goes on"
            ) from None
    before = f", {earlier} of them earlier" if earlier else ""
    if not as_json:
        console.print(f"{done} of {count} images done{before}, results in {out}", soft_wrap=True)
    for reason in broken:
        complain(f"error: {reason}")
    if broken:
        raise typer.Exit(1)


def _table(segmentation: "Segmentation") -> "Table":
    """Return a table of the words that occur, with their pixels' mean confidence."""
    from opensan.outputs import mean_confidence

    names, labels = segmentation.names, segmentation.labels
    confidence = dict(zip(names, mean_confidence(labels, segmentation.confidence, len(names)), strict=True))
    return word_table(
        segmentation.areas,
        float((labels < 0).mean()),
        "confidence" if segmentation.calibration is None else "probability",
        lambda name, _: f"{confidence[name]:.2f}" if name in confidence else "",
    )


def _summary(written: "Written") -> str:
    """Return the three largest words, and the unlabelled share."""
    from opensan.outputs import format_share

    areas = sorted(written.areas.items(), key=lambda item: -item[1])
    shares = [f"{name} {format_share(area)}" for name, area in areas[:3] if area > 0]
    if written.unlabelled:
        shares.append(f"unlabelled {format_share(written.unlabelled)}")
    return ", ".join(shares)
