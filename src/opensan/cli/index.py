"""`opensan index`: encode collections of images once, and search them with any words."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opensan.choices import SearchBy
from opensan.cli.asked_words import (
    Background,
    Rest,
    Templates,
    Words,
    WordsFile,
    WordsSet,
    asked_vocabulary,
    embed_words,
)
from opensan.cli.many_machines import Address, On, PerGpu, Workers, check_engine
from opensan.cli.options import MODEL, RESULTS, AsJson, Device, ImageDtype, Out, SpeedChoice, listed_formats
from opensan.cli.segment import label_many
from opensan.cli.terminal import (
    SMALLER,
    Command,
    Commands,
    UsageError,
    complain,
    note,
    output_console,
    print_json,
    progress_of_steps,
    telling_of_memory,
)
from opensan.errors import UserError

if TYPE_CHECKING:
    from opensan.index.adding import Encoders
    from opensan.index.answers import Answer
    from opensan.index.collection import Index
    from opensan.index.head import Maker

SHOWN = 10
"""Most files of one content that are named."""

index = typer.Typer(name="index", cls=Commands, rich_markup_mode=None)

Folder = Annotated[Path, typer.Argument(metavar="INDEX", help="The index: a folder.", show_default=False)]
IndexModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="As for opensan segment; the model that made the index, if not given.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]


@index.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    """Encode collections of images once, and search them with any words."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@index.command(cls=Command)
def add(
    folder: Folder,
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE_OR_FOLDER...", help="Images, or folders of images.", show_default=False),
    ],
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="For a new index: keep encodings whole, so that relabel gives the labels of segment."
        ),
    ] = False,
    model: IndexModel = None,
    device: Device = "auto",
    speed: SpeedChoice = "exact",
    dtype: ImageDtype = None,
    batch: Annotated[int, typer.Option(min=1, help="Images computed together, if their shapes agree.")] = 1,
    on: On = None,
    workers: Workers = None,
    per_gpu: PerGpu = 1,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Encode images into an index, which is made if there is none.

    A stopped run goes on with the same command; images that have changed since are encoded again. A new index is of
    --model san-vit-b16 unless another one is given.
    """
    from opensan.index.collection import Index

    check_engine(on, workers, address, per_gpu, {})
    console = output_console()
    collection = Index(folder, model, device=device, speed=speed, dtype=dtype)
    done = 0
    try:
        with (
            _encoders(collection, images, workers, address, batch, per_gpu) as encoders,
            progress_of_steps() as show,
        ):

            def tell(count: int, total: int) -> None:
                nonlocal done
                done = count
                show("encoding", count, total)

            added = collection.add([*images], exact=exact, batch=batch, progress=tell, encoders=encoders)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{done} images encoded; the same command goes on") from None
    for path, other in (added.same + added.moved)[:SHOWN]:
        complain(f"{path}: has the content of {other}, and shares its encoding")
    if (more := len(added.same + added.moved) - SHOWN) > 0:
        complain(f"{more} more files have the content of others")
    for reason in added.broken:
        complain(f"error: {reason}")
    counts = {name: getattr(added, name) for name in ("new", "changed", "unchanged")}
    counts |= {name: len(getattr(added, name)) for name in ("same", "moved", "broken")}
    if as_json:
        print_json({"index": str(folder), **counts})
    else:
        told = ", ".join(f"{count} {name}" for name, count in counts.items() if count or name == "new")
        console.print(f"{told}: {collection.info()['images']} images in {folder}", soft_wrap=True)
    if added.broken:
        raise typer.Exit(1)


@contextmanager
def _encoders(
    collection: "Index", images: list[Path], workers: int | None, address: str | None, batch: int, per_gpu: int
) -> "Iterator[tuple[Encoders, Maker] | None]":
    """Yield workers on Ray and what their model is; None where this process encodes."""
    if workers is None:
        note("loading the model")
        yield None
        return
    from opensan.images import list_images
    from opensan.index.on_ray import OBJECT_STORE, RayEncoders
    from opensan.jobs.on_ray import cluster

    list_images(images)  # a mistake there is told before workers start
    loading = collection.loading()
    note(f"starting {workers} workers with {loading['source']}")
    with cluster(address, workers, store=OBJECT_STORE) as cpus, telling_of_memory("a worker", SMALLER):
        hired = RayEncoders(workers, loading, batch=batch, cpus=cpus, per_gpu=per_gpu, note=complain)
        yield hired, hired.maker()


@index.command(cls=Command)
def search(
    folder: Folder,
    words: Annotated[
        str,
        typer.Argument(metavar="WORD", help='What to find: "zebra crossing"; | joins synonyms.', show_default=False),
    ],
    also: Annotated[
        list[str] | None,
        typer.Option("--and", metavar="WORD", help="A word that must be in the image too.", show_default=False),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option("--not", metavar="WORD", help="A word that must not be in the image.", show_default=False),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="WORDS",
            help="Contrast words, with which the word competes for each region: words, or a ready set; none. "
            "Default: the words of all bundled sets.",
            show_default=False,
        ),
    ] = None,
    by: Annotated[SearchBy, typer.Option(help="Score images by their best region, or by the word's area.")] = "region",
    top: Annotated[int, typer.Option(min=1, help="Number of images.")] = 50,
    least: Annotated[float, typer.Option(min=0, max=1, help="Least probability of a region that is listed.")] = 0.5,
    every: Annotated[
        bool, typer.Option("--all", help="Look at all proposals, also where an index of the vectors proposes some.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Also write a page with pictures (.html), everything with masks (.json), or a COCO data set "
            "(.coco.json).",
            show_default=False,
            rich_help_panel=RESULTS,
        ),
    ] = None,
    model: IndexModel = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Find the images of an index that show a word, with the matching regions."""
    from opensan.index.collection import Index
    from opensan.outputs import check_writable

    if out is not None and out.suffix.lower() not in (".html", ".json"):
        raise UsageError(f"--out {out}: write to a name that ends in .html, .json or .coco.json")
    if out is not None:
        if not out.parent.is_dir():
            raise UserError(f"{out}: cannot write there (there is no such folder)")
        check_writable(out.parent)
    collection = Index(folder, model, device=device)
    answer = collection.search(
        words,
        also=also or (),
        without=without or (),
        against=_contrast(against),
        by=by,
        top=top,
        least=least,
        approximate=False if every else None,
    )
    if out is not None:
        _write(out, answer, collection.segmenter.max_pixels)
    if as_json:
        print_json(answer.to_dict(), indent=None)
        return
    _print(answer)
    if out is not None:
        output_console().print(f"wrote {out}", soft_wrap=True)


@index.command(cls=Command)
def relabel(
    folder: Folder,
    words: Words = None,
    words_file: WordsFile = None,
    words_set: WordsSet = None,
    background: Background = None,
    templates: Templates = None,
    rest: Rest = False,
    out: Out = Path("out"),
    formats: Annotated[
        str,
        typer.Option(
            "--format", metavar="LIST", help="What to write: as for opensan segment.", rich_help_panel=RESULTS
        ),
    ] = "png,json",
    model: IndexModel = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Label all images of an index with other words, without running the image half of the model again.

    The files and their names are those of opensan segment. For an exact index so are the labels, to the pixel.
    """
    from opensan import outputs
    from opensan.index.collection import Index
    from opensan.jobs.folder import FolderRun, plan

    vocabulary = asked_vocabulary(words, words_file, words_set, background, templates, rest)
    kinds = listed_formats([formats])
    outputs.check_formats_of_many(kinds, len(vocabulary.names))
    outputs.check_writable(out)
    collection = Index(folder, model, device=device)
    paths, segmenter = collection.stored_segmenter(pixels="overlay" in kinds)
    embed_words(segmenter, vocabulary)
    if rest:
        vocabulary = segmenter.with_rest(vocabulary)
    jobs = plan(paths, paths)
    label_many(FolderRun(segmenter, vocabulary, jobs, out, kinds), len(jobs), out, as_json)


@index.command(cls=Command)
def info(folder: Folder, as_json: AsJson = False) -> None:
    """Tell what is in an index."""
    from opensan.index.collection import Index

    told = Index(folder).info()
    if as_json:
        print_json(told)
        return
    console = output_console()
    console.print(f"{told['images']:,} images, {told['proposals']:,} proposals, {told['bytes'] / 1e6:,.1f} MB")
    console.print(f"model {told['model']} ({told['source'] or 'made in a program'}), speed {told['speed']}")
    console.print("exact: encodings are kept whole" if told["exact"] else "not exact: vectors in half precision")


@index.command(cls=Command)
def remove(
    folder: Folder,
    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="IMAGE_OR_FOLDER...", help="Images, or folders: all below.", show_default=False),
    ] = None,
    missing: Annotated[bool, typer.Option("--missing", help="Also images whose files are gone.")] = False,
) -> None:
    """Remove images from an index; the files themselves stay."""
    from opensan.index.collection import Index

    if not images and not missing:
        raise UsageError("name images or folders to remove, or give --missing")
    collection = Index(folder)
    count = collection.remove([*(images or [])], missing=missing)
    output_console().print(f"{count} removed: {collection.info()['images']} images in {folder}", soft_wrap=True)


@index.command(cls=Command)
def compact(folder: Folder, model: IndexModel = None, device: Device = "auto") -> None:
    """Merge an index's files and drop what was removed; build an index of the vectors if there are many.

    Where an earlier version made the index, what makes searches quick is computed too, with the index's model.
    """
    from opensan.index.collection import Index

    collection = Index(folder, model, device=device)
    before = collection.info()["bytes"]
    with progress_of_steps() as show:
        collection.compact(progress=lambda done, total: show("comparing with contrast words", done, total))
    after = collection.info()["bytes"]
    output_console().print(f"{before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB now, in {folder}", soft_wrap=True)


def _contrast(text: str | None) -> Any:
    """Return the contrast words of --against."""
    from opensan.vocabulary import Vocabulary, ready_sets

    if text is None:
        return None
    if text == "none":
        return ()
    return Vocabulary.ready(text) if text in ready_sets() else text


def _write(path: Path, answer: "Answer", max_pixels: int) -> None:
    """Write an answer in the form that the file's name says."""
    from opensan.errors import writing
    from opensan.files import json_text, write_text

    with writing(path):
        if path.suffix.lower() == ".html":
            from opensan.index.page import write_page

            for line in write_page(path, answer, max_pixels=max_pixels):
                complain(f"warning: {line}")
        else:
            coco = path.name.lower().endswith(".coco.json")
            write_text(path, json_text(answer.to_coco() if coco else answer.to_dict()) + "\n")


def _print(answer: "Answer") -> None:
    """Print a line an image."""
    console = output_console()
    for match in answer:
        best = match.regions[0]
        box = ",".join(map(str, best.box))
        console.print(
            f"{match.score:.3f}  {match.path}  {len(match.regions)} regions, best {best.probability:.2f} at {box}",
            soft_wrap=True,
        )
    looked = "the likely ones of" if answer.approximate else "all"
    console.print(f"{len(answer)} images, of {looked} {answer.images:,}", soft_wrap=True)
