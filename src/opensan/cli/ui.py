"""`opensan ui`: run the web page and its service, on this machine only."""

import signal
import webbrowser
from functools import partial
from threading import Thread
from typing import Annotated, Any

import typer

from opensan.cli.options import Device, ModelOnDisk, SearchedIndex, SpeedChoice
from opensan.cli.serve import require_serve_extra
from opensan.cli.terminal import note

HOST = "127.0.0.1"


def ui(
    model: ModelOnDisk = None,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 chooses a free one.")] = 8321,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in your browser.")] = True,
    device: Device = "auto",
    speed: SpeedChoice = "exact",
    index: SearchedIndex = None,
) -> None:
    """Open a page where words act at once: an image is encoded once, and every keystroke updates the labels.

    Without --model it takes the model of --index, else the official weights if they are on disk, else photo. It listens
    on this machine only. Ctrl-C ends it.
    """
    require_serve_extra()
    from opensan.checkpoints.hub import BUNDLED, model_on_disk
    from opensan.index.collection import model_of
    from opensan.segmenters.load import load
    from opensan.serve import ServiceLimits, create_app
    from opensan.serve.server import bind, run

    def started(url: str) -> None:
        print(url, flush=True)
        if open_browser:
            Thread(target=webbrowser.open, args=(url,), daemon=True).start()  # some browsers return only when they end

    listener = bind(HOST, port)
    model = model or (model_of(index) if index else None) or model_on_disk()
    note(f"loading {model}")
    limits = ServiceLimits()
    # Every half-typed word is embedded, which would fill a disk cache.
    settings: Any = {"device": device, "speed": speed, "max_pixels": limits.pixels, "text_cache": False}
    segmenter = load(model, **settings)
    # A web page under another name that resolves to this machine must not reach the images.
    others = {name: partial(load, name, **settings) for name in BUNDLED}
    app = create_app(segmenter, limits=limits, page=True, hosts=[HOST, "localhost"], others=others, index=index)
    if run(app, listener, started) == signal.SIGINT:
        raise KeyboardInterrupt
