"""`opensan segment-video`: label a video and write an overlay video, label frames and a table."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
)
from opensan.cli.options import (
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
    say_what_tiny_knows,
)
from opensan.cli.terminal import complain, note, open_file, output_console, print_json, progress_bar
from opensan.cli.word_table import word_table
from opensan.errors import UserError

if TYPE_CHECKING:
    from opensan.jobs.video import VideoRun


def segment_video(
    video: Annotated[Path, typer.Argument(metavar="VIDEO", help="MP4, MOV, MKV, WebM, AVI...", show_default=False)],
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
    every: Annotated[
        int, typer.Option(min=1, metavar="N", help="Take every Nth frame only, in the overlay video too.")
    ] = 1,
    steady: Annotated[
        bool,
        typer.Option(
            help="Keep regions from flickering, by what was seen in the frames before. Without it, a frame is labelled "
            "as `opensan segment` would label it."
        ),
    ] = True,
    device: Device = "auto",
    speed: SpeedChoice = "exact",
    dtype: ImageDtype = None,
    adapt: Adapting = None,
    batch: Annotated[int, typer.Option(min=1, help="Frames that go through the model together.")] = 1,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Videos with larger frames are refused before they are decoded.")
    ] = 100_000_000,
    as_json: AsJson = False,
    show: Show = False,
) -> None:
    """Label every pixel of a video with words, in memory that does not grow with its length.

    Writes STEM.overlay.mp4 (the video under its words' colours, with a legend and the sound), STEM.labels/000000.png (a
    label map a frame) and STEM.frames.csv (time and area of each word, a frame a line). Stopped in whatever way, the
    same command goes on where it was. Needs the extra `video`.
    """
    vocabulary = asked_vocabulary(words, words_file, words_set, background, templates, rest)
    checked_threshold(threshold)
    from opensan import outputs

    outputs.check_writable(out)
    from opensan.jobs.video import VideoReader, VideoRun

    VideoReader(video, max_pixels=max_pixels).close()  # before the model, which takes longer to load
    note(f"loading {model}")
    say_what_tiny_knows(model, [video])
    from opensan.segmenters.load import load

    segmenter = load(model, device=device, speed=speed, dtype=dtype, max_pixels=max_pixels, calibration=calibration)
    if adapt is not None:
        segmenter = segmenter.adapting(vocabulary, adapt)
    if rest:
        vocabulary = segmenter.with_rest(vocabulary)
    embed_words(segmenter, vocabulary)
    try:
        with VideoRun(
            segmenter, vocabulary, video, out, every=every, steady=steady, batch=batch, threshold=threshold
        ) as run:
            _run(run, as_json)
        if show:
            open_file(run.paths[0])
    except (MemoryError, RuntimeError) as error:
        if type(error).__name__ not in ("MemoryError", "OutOfMemoryError"):  # the latter is torch's
            raise
        raise UserError(f"out of memory on {segmenter.device}: try a smaller --batch") from None


def _run(run: "VideoRun", as_json: bool) -> None:
    while run.notes:
        complain(run.notes.pop(0))
    if run.finished:
        complain(f"going on at frame {run.finished}")
    console = output_console()
    try:
        with (
            progress_bar(console, "segmenting", run.count, speed_of="frames") as advance,
            closing(run.results()) as results,
        ):
            for _ in results:
                advance(1)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{run.done} frames done; the same command goes on from there") from None
    for line in run.notes:
        complain(f"warning: {line}")
    overlay, labels, table = run.paths
    if as_json:
        files = {"overlay": str(overlay), "labels": str(labels), "table": str(table)}
        print_json({"video": str(run.path), "frames": run.done, "areas": run.areas, "files": files})
        return
    console.print(word_table(run.areas, 1 - sum(run.areas.values())))
    for path, remark in ((overlay, ""), (labels, f" ({run.done} label frames)"), (table, "")):
        console.print(f"wrote {path}{remark}", soft_wrap=True)
