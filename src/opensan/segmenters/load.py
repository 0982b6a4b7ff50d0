"""Load any model, with torch or, if it was exported, without: `opensan.load`."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from opensan import without_garbage_collection
from opensan.assemble.calibration import FILE_NAME, Calibration
from opensan.choices import Dtype, Speed
from opensan.errors import UserError
from opensan.images import MAX_PIXELS
from opensan.segmenters.base import Segmenter
from opensan.segmenters.exported.manifest import exported_folder

if TYPE_CHECKING:
    import torch


def load(
    source: str | os.PathLike[str] = "san-vit-b16",
    *,
    device: "str | torch.device" = "auto",
    speed: Speed = "exact",
    dtype: Dtype | None = None,
    random_weights: int | None = None,
    max_pixels: int = MAX_PIXELS,
    text_cache: bool = True,
    threads: int | None = None,
    calibration: str | os.PathLike[str] | None = None,
) -> Segmenter:
    """Load a model, ready to segment.

    Args:
        source: "san-vit-b16", "san-vit-l14" (official weights, from the hub), "photo", "tiny" (in the package);
            a checkpoint folder, a .safetensors, an official .pth, or a hub id "owner/name" ("owner/name@REVISION": a
            commit, branch or tag); or an exported model: its folder, or a graph in it ("exported/image.onnx"). An
            exported model needs no torch. With "maskclip:", "two-stage:" or "mask-tokens:" before it, another method
            labels with its weights (docs/baselines.md).
        device: "auto" ("cuda" where torch finds a GPU, else "cpu"), "cpu", "cuda", "cuda:1", "mps". An exported
            model runs on the CPU.
        speed: "exact" computes the image half in float32; "fast" and "fastest" multiply matrices of the backbone, or of
            both networks, in bfloat16, with nearly the same labels (see docs/speed.md). For an exported model it was
            chosen at export.
        dtype: "float32" or "bfloat16", the precision of the blocks that `speed` narrows ("exact": of all blocks); None
            lets `speed` choose.
        random_weights: a seed; builds the named preset with random weights and no download.
            For benchmarks and shape work only: labels are random.
        max_pixels: larger images are refused, before they are decoded.
        text_cache: keep text embeddings on disk (in the user's cache folder, or where OPENSAN_CACHE says).
        threads: number of threads of an exported model's runtime; None lets the runtime choose.
            With torch, `torch.set_num_threads` decides for the whole process.
        calibration: a file that `opensan calibrate` wrote for this model; None: the file calibration.json in the
            model's folder, if there is one.

    Raises:
        ValueError: unknown model or option, a damaged file, or a missing library; one line.
        HubError: the hub did not answer; names the attempts and what works offline.
    """
    chosen = find_calibration(source, calibration)  # a damaged file is reported before the model is loaded
    segmenter = _load(
        source,
        device=device,
        speed=speed,
        dtype=dtype,
        random_weights=random_weights,
        max_pixels=max_pixels,
        text_cache=text_cache,
        threads=threads,
    )
    calibrate(segmenter, chosen)
    return segmenter


def find_calibration(
    source: str | os.PathLike[str], given: str | os.PathLike[str] | None = None
) -> tuple[Path, Calibration] | None:
    """Read the calibration `given`, or else the one in the folder or repository of the model `source`; None without.

    Raises UserError, one line, for a file that is missing or no calibration.
    """
    if given is not None:
        return Path(given), Calibration.load(given)
    own = Path(source) / FILE_NAME
    path = own if own.is_file() else _on_hub(source)
    return None if path is None else (path, Calibration.load(path))


def _on_hub(source: str | os.PathLike[str]) -> Path | None:
    """Return the calibration in the hub's repository that `source` names; None without it, and for other sources."""
    # What is on disk is in no repository; and exported models, which are on disk, must not wait for torch.
    if find_spec("torch") is None or Path(source).expanduser().exists():
        return None
    from opensan.checkpoints.hub import optional_file

    return optional_file(source, FILE_NAME)


def calibrate(segmenter: Segmenter, chosen: tuple[Path, Calibration] | None) -> None:
    """Have a segmenter use what `find_calibration` returned. Raises UserError if it is of another model."""
    if chosen is None:
        return
    path, calibration = chosen
    try:
        segmenter.calibrate(calibration)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _load(
    source: str | os.PathLike[str],
    *,
    device: "str | torch.device",
    speed: Speed,
    dtype: Dtype | None,
    random_weights: int | None,
    max_pixels: int,
    text_cache: bool,
    threads: int | None,
) -> Segmenter:
    """Load a model without its calibration; arguments and errors as for `load`."""
    folder = exported_folder(source)
    if folder is None:
        if find_spec("torch") is None:
            raise UserError(
                f"model {os.fspath(source)!r} needs torch (pip install torch); without torch, opensan runs models that "
                "`opensan export` wrote"
            )
        if threads is not None:
            raise UserError(
                f"threads can't be chosen for one model with torch: call torch.set_num_threads({threads}) instead"
            )
        return load_with_torch(
            source,
            device=device,
            speed=speed,
            dtype=dtype,
            random_weights=random_weights,
            max_pixels=max_pixels,
            text_cache=text_cache,
        )
    with without_garbage_collection():
        from opensan.segmenters.exported.segmenter import ExportedSegmenter

    decided = {
        "device": str(device) in ("auto", "cpu"),
        "speed": speed == "exact",
        "dtype": dtype is None,
        "random_weights": random_weights is None,
    }
    for name, default in decided.items():
        if not default:
            raise UserError(f"{name} can't be chosen for an exported model ({folder}): it runs on the CPU as exported")
    return ExportedSegmenter(folder, max_pixels=max_pixels, text_cache=text_cache, threads=threads or 0)


def load_with_torch(
    source: str | os.PathLike[str],
    *,
    device: "str | torch.device" = "auto",
    speed: str = "exact",
    dtype: str | None = None,
    random_weights: int | None = None,
    max_pixels: int = MAX_PIXELS,
    text_cache: bool = True,
) -> Segmenter:
    """Load a SAN, or a baseline on its weights ("METHOD[,OPTION...]:MODEL"); arguments and errors as for `load`."""
    from opensan.segmenters.baselines import parse_baseline

    baseline = parse_baseline(os.fspath(source))
    if baseline is not None and (speed != "exact" or dtype not in (None, "float32")):
        raise UserError(f"{baseline.method} computes in float32 alone: leave speed at exact, and out dtype")
    with without_garbage_collection():
        from opensan.segmenters.san import load_san
    if baseline is None:
        return load_san(
            source,
            device=device,
            speed=speed,
            dtype=dtype,
            random_weights=random_weights,
            max_pixels=max_pixels,
            text_cache=text_cache,
        )
    from opensan.segmenters.baselines.build import load_baseline

    return load_baseline(
        baseline, device=device, random_weights=random_weights, max_pixels=max_pixels, text_cache=text_cache
    )
