"""`opensan serve`: serve one model over HTTP."""

import importlib.util
import signal
from typing import Annotated, Any

import typer

from opensan.cli.many_machines import Address, On, PerGpu, Workers, check_engine, loading_of
from opensan.cli.options import Calibrated, Device, Model, SearchedIndex, SpeedChoice
from opensan.cli.terminal import UsageError, complain, note
from opensan.errors import UserError, install

_NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "multipart": "python-multipart",
           "fastapi_offline": "fastapi-offline",
           "prometheus_client": "prometheus-client", "batched": "batched"}  # fmt: skip


def serve(
    model: Model = "san-vit-b16",
    calibration: Calibrated = None,
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 chooses a free one.")] = 8000,
    device: Device = "auto",
    speed: SpeedChoice = "exact",
    batch: Annotated[int, typer.Option(min=1, help="Images of one shape encoded together; more help a GPU.")] = 4,
    token: Annotated[
        str | None,
        typer.Option(envvar="OPENSAN_TOKEN", help="Clients must send it as a bearer token.", show_default=False),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name by which clients call the service, as in http://NAME:8000; repeat it for more. Requests to "
            "other names are refused. Default: any name.",
            show_default=False,
        ),
    ] = None,
    label_studio: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Be the ML backend of the Label Studio at this address, and read its images (no others).",
            show_default=False,
        ),
    ] = None,
    label_studio_key: Annotated[
        str | None,
        typer.Option(envvar="LABEL_STUDIO_API_KEY", help="An access token of Label Studio.", show_default=False),
    ] = None,
    max_bytes: Annotated[int, typer.Option(min=1, help="Bytes of one request.")] = 20 << 20,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of one image.")] = 25_000_000,
    max_words: Annotated[int, typer.Option(min=1, help="Words of one request, with synonyms and background.")] = 512,
    queue: Annotated[int, typer.Option(min=1, help="Images that may wait; more are refused with 429.")] = 16,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds within which a request must be answered.")] = 30.0,
    keep: Annotated[int, typer.Option(min=1, help="Encodings kept.")] = 64,
    keep_seconds: Annotated[float, typer.Option(min=1, help="Seconds to keep an encoding after its last use.")] = 900,
    index: SearchedIndex = None,
    on: On = None,
    workers: Workers = None,
    per_gpu: PerGpu = 1,
    address: Address = None,
) -> None:
    """Serve a model over HTTP: encode an image once, label it with any words.

    /docs tells the API, /metrics the load. SIGTERM and Ctrl-C finish what was accepted.
    """
    check_engine(on, workers, address, per_gpu, {})
    if token == "":
        raise UsageError("--token is empty: leave it out to admit everybody")
    if on is not None and index is not None:
        raise UsageError("--index is searched by one process: leave out --on")
    require_serve_extra()
    from opensan.serve import ServiceLimits

    limits = ServiceLimits(
        request_bytes=max_bytes,
        pixels=max_pixels,
        words=max_words,
        waiting=queue,
        queue_seconds=timeout,
        cache_entries=keep,
        cache_seconds=keep_seconds,
    )
    from opensan.segmenters.load import load
    from opensan.serve import create_app
    from opensan.serve.server import bind, run
    from opensan.serve.task_images import TaskImages

    if on is not None:
        assert workers is not None
        loading = loading_of(model, device, speed, None, max_pixels, calibration)
        studio = None if label_studio is None else (label_studio, label_studio_key or None)
        made = {"limits": limits, "token": token, "batch": batch, "label_studio": studio}
        hosts = tuple(allow_host) if allow_host else None
        _serve_on_ray({**made, "hosts": hosts, "loading": loading}, workers, per_gpu, address, host, port)
        return
    images = None if label_studio is None else TaskImages(label_studio, label_studio_key or None, limits)
    listener = bind(host, port)
    note(f"loading {model}")
    # Clients' words are cached in memory only, where their number is bounded.
    segmenter = load(
        model, device=device, speed=speed, max_pixels=max_pixels, text_cache=False, calibration=calibration
    )
    app = create_app(
        segmenter,
        limits=limits,
        token=token,
        batch=batch,
        hosts=allow_host or None,
        label_studio=images,
        index=index,
    )
    signal_number = run(app, listener, started=lambda url: complain(f"serving {segmenter.identity} at {url}"))
    if signal_number == signal.SIGINT:
        raise KeyboardInterrupt


def _serve_on_ray(made: dict[str, Any], workers: int, per_gpu: int, address: str | None, host: str, port: int) -> None:
    """Serve by workers; `made` are arguments of `opensan.serve.on_ray.Deployment`."""
    import os

    from opensan.jobs.on_ray import cluster, gpus_each
    from opensan.serve.on_ray import OBJECT_STORE, Deployment, check_serve, run_on_ray
    from opensan.serve.server import bind
    from opensan.serve.task_images import TaskImages

    check_serve()
    if made["label_studio"]:
        TaskImages(*made["label_studio"])  # a bad address is told before any worker starts
    local = not (address or os.environ.get("RAY_ADDRESS"))
    if local:
        listener = bind(host, port)  # an address that is taken is told before any worker starts
        port = listener.getsockname()[1]
        listener.close()
    source = made["loading"]["source"]
    note(f"starting {workers} workers with {source}")
    with cluster(address, workers, twice=True, store=OBJECT_STORE) as cpus:
        gpus = gpus_each(made["loading"]["device"], per_gpu)
        deployment = Deployment(**made, replicas=workers, cpus=cpus, gpus=gpus)
        signal_number = run_on_ray(
            deployment,
            host,
            port,
            local=local,
            started=lambda url: complain(f"serving {source} by {workers} workers at {url}"),
            note=complain,
        )
    if signal_number == signal.SIGINT:
        raise KeyboardInterrupt


def require_serve_extra() -> None:
    """Raise UserError, one line, if packages of the service are missing."""
    missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"the service needs {', '.join(missing)}: {install('serve')}")
