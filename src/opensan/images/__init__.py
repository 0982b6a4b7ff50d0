"""Read images of any kind as 8-bit RGB, and prepare them as network input.

Letters: H W the network image, H0 W0 the image as given.
"""

import functools
import io
import math
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from opensan.buckets import BucketPath, bucket_path
from opensan.config import ImageConfig
from opensan.errors import UserError, reason, short
from opensan.files import absolute
from opensan.images.pixels import deep_grey, tiff_tags
from opensan.structures import ImageSizes

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 100_000_000
"""Larger images are refused unless the caller raises the limit, because decoding takes memory and time."""

T = TypeVar("T")

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray | torch.Tensor"

# Raster formats that Pillow decodes itself; not EPS and similar ones, which need an interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "MPO")
# Those of them that Pillow imports by itself; it takes a tenth of a second to import its readers of all formats.
_USUAL_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM")
# Photographs in formats that can't be read: users expect them to be segmented, so they are reported.
FOREIGN_SUFFIXES = frozenset({".heic", ".heif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2"})
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")
# EXIF orientation -> the transposition that puts the image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = {_UPRIGHT[orientation] for orientation in (5, 6, 7, 8)}
_ORIENTATION_TAG = 0x0112
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257


class ImageError(UserError):
    """An image that can't be used; the message is one line and names it."""


@dataclass(frozen=True)
class PreparedImage:
    """An image as network input."""

    pixels: "torch.Tensor | np.ndarray"
    """[3, H, W] float32, normalised, zero-padded at the bottom and right to `sizes.padded`."""
    sizes: ImageSizes


def open_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read one image as uint8 RGB [H0, W0, 3], a new contiguous array.

    `source` is a path, the bytes of an image file, a PIL image, a uint8 numpy array ([H0, W0] grey, [H0, W0, 3] RGB or
    [H0, W0, 4] RGBA), a uint8 torch tensor ([3, H0, W0], or [H0, W0, 3] if its first dimension isn't 3), or a uint8
    `tv_tensors.Image` of torchvision ([1, H0, W0] grey, [3, H0, W0], or [4, H0, W0] RGBA).
    EXIF rotation is applied; transparency is blended with white, as viewers show it; 16-bit grey is scaled by its full
    range (65,535 is white); of an animation the first frame is taken; colour profiles are ignored.

    Raises ImageError, one line, naming the source: unreadable, not an image, damaged, without pixels, or of more than
    `max_pixels` pixels (known from the header, before anything is decoded).
    """
    if isinstance(source, str) and _URL.match(source) and bucket_path(source) is None:
        raise ImageError(f"{short(source, 120)}: URLs are not fetched; download it first")
    if isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        return _read_file(source, lambda image, name: _decode(image, name, max_pixels))
    if isinstance(source, Image.Image):
        with _without_pillow_limit():
            return _decode(source, "PIL image", max_pixels)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.Tensor):
        return _from_array(_channels_last(source), "torch tensor", max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, "numpy array", max_pixels)
    raise ImageError(
        f"an image is a path, bytes, a PIL image, a numpy array or a torch tensor, not {type(source).__name__}"
    )


def stored_size(
    source: str | os.PathLike[str] | bytes, *, max_pixels: int = MAX_PIXELS
) -> tuple[tuple[int, int], Image.Transpose | None]:
    """Return height and width of an image file's stored pixels, and how `open_image` turns them upright.

    The transposition is None where EXIF asks for none. The pixels are not decoded (except a PNG's, whose EXIF may stand
    behind them). Raises ImageError as `open_image` does.
    """

    def size_and_turn(image: Image.Image, name: str) -> tuple[tuple[int, int], Image.Transpose | None]:
        check_size(image.height, image.width, name, max_pixels)
        size = (image.height, image.width)
        tags = tiff_tags(image)
        if tags:  # Pillow turns these itself and may report the turned size
            size = (tags[_TIFF_HEIGHT], tags[_TIFF_WIDTH])
        return size, _UPRIGHT.get(_orientation(image))

    return _read_file(source, size_and_turn)


def image_size(source: str | os.PathLike[str] | bytes) -> tuple[int, int]:
    """Return (H0, W0) of the array that `open_image` makes of a file, without decoding it; errors as there."""
    (height, width), turn = stored_size(source)
    return (width, height) if turn in _SIDEWAYS else (height, width)


def network_size(image_size: tuple[int, int], config: ImageConfig) -> tuple[int, int]:
    """Return (H, W) of the network image for an image of `image_size` (H0, W0), before padding.

    The short side becomes `config.short_side`, or the long side `config.long_side` if it would exceed that.
    Rounding is int(x + 0.5), as in the official evaluation; no side becomes less than one pixel.
    """
    scale = config.short_side / min(image_size)
    sides = [config.short_side if side == min(image_size) else scale * side for side in image_size]
    if max(sides) > config.long_side:
        shrink = config.long_side / max(sides)
        sides = [side * shrink for side in sides]
    height, width = (max(1, int(side + 0.5)) for side in sides)
    return height, width


def padded_size(network_size: tuple[int, int], config: ImageConfig) -> tuple[int, int]:
    """Return (H, W) after padding each side to a multiple of `config.size_divisor`."""
    height, width = (math.ceil(side / config.size_divisor) * config.size_divisor for side in network_size)
    return height, width


def prepare(image: np.ndarray, config: ImageConfig, *, resize: bool = True) -> PreparedImage:
    """Prepare an image as `prepare_array` does, with the pixels as a torch tensor."""
    import torch  # everything else here is also used where torch is not installed

    prepared = prepare_array(image, config, resize=resize)
    return PreparedImage(torch.from_numpy(prepared.pixels), prepared.sizes)


def prepare_array(image: np.ndarray, config: ImageConfig, *, resize: bool = True) -> PreparedImage:
    """Turn an image, uint8 RGB [H0, W0, 3], into network input.

    Resized by Pillow's bilinear filter (the official evaluation's; its demo used another), normalised, zero-padded
    to a multiple of `config.size_divisor`. `resize=False` takes the image as it is, already at network scale.
    """
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3, (image.dtype, image.shape)
    image_size = (image.shape[0], image.shape[1])
    height, width = network_size(image_size, config) if resize else image_size
    if (height, width) != image_size:
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    padded = padded_size((height, width), config)
    pixels = np.zeros((3, *padded), dtype=np.float32)
    mean, std = (np.array(values, dtype=np.float32).reshape(3, 1, 1) for values in (config.mean, config.std))
    inside = pixels[:, :height, :width]
    np.subtract(image.transpose(2, 0, 1), mean, out=inside)
    inside /= std
    return PreparedImage(pixels, ImageSizes(image=image_size, network=(height, width), padded=padded))


def list_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """List the image files of `paths`, each once.

    Paths may be addresses in buckets (s3://, gs://). A file is taken with any name; a folder gives the images in it and
    below it, by suffix, sorted, without hidden ones and without following links to folders. Warns of images in formats
    that can't be read (.heic, .dng).
    Raises ImageError, one line, on a path that does not exist, a folder or bucket that can't be listed, and a folder
    without images.
    """
    files: dict[str, Path] = {}
    for path in paths:
        if isinstance(path, str) and _URL.match(path) and bucket_path(path) is None:
            raise ImageError(f"{short(path, 120)}: URLs are not fetched; download it first")
        path = bucket_path(path) or Path(path)
        try:
            for file in _images_below(path) if path.is_dir() else [path]:
                files.setdefault(str(absolute(file)), file)
            exists = path.exists()
        except OSError as error:  # of a bucket
            raise ImageError(f"{path}: can't be reached ({error.strerror or error})") from None
        if not exists:
            raise ImageError(f"{path}: does not exist")
    return list(files.values())


@functools.cache
def known_suffixes() -> frozenset[str]:
    """Return the suffixes of images in folders for `list_images` (".jpg", ...; lower case)."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _FORMATS)


def _images_below(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise ImageError(f"{error.filename}: the folder can't be listed ({error.strerror})") from None

    images, foreign = [], []
    for paths in [_in_bucket(folder)] if isinstance(folder, BucketPath) else _walked(folder, refuse):
        images += [path for path in paths if path.suffix.lower() in known_suffixes()]
        foreign += [path for path in paths if path.suffix.lower() in FOREIGN_SUFFIXES]
    if foreign:
        warnings.warn(f"{folder}: left out, as their format can't be read: {_first_names(foreign)}", stacklevel=3)
    if not images:
        raise ImageError(f"{folder}: no images in this folder (known are {', '.join(sorted(known_suffixes()))})")
    return sorted(images)


def _walked(folder: Path, refuse: Callable[[OSError], None]) -> Iterator[list[Path]]:
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield [Path(parent, name) for name in files if not name.startswith(".")]


def _in_bucket(folder: BucketPath) -> list[Path]:
    inside = len(folder.parts)
    return [path for path in folder.below() if not any(part.startswith(".") for part in path.parts[inside:])]


def _first_names(paths: list[Path]) -> str:
    names = [path.name for path in sorted(paths)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Lift Pillow's own limit (a warning from 89, an error from 179 million pixels): `max_pixels` is checked instead.

    Pillow's limit is global, so the first thread that enters lifts it and the last that leaves restores it.
    """
    with _limit.lock:
        if _limit.users == 0:
            _limit.saved, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _limit.users += 1
    try:
        yield
    finally:
        with _limit.lock:
            _limit.users -= 1
            if _limit.users == 0:
                Image.MAX_IMAGE_PIXELS = _limit.saved


class _Limit:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.saved: int | None = None


_limit = _Limit()


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _read_file(source: str | os.PathLike[str] | bytes, read: Callable[[Image.Image, str], T]) -> T:
    """Return the result of `read` on an image file (a path, or its content), given the opened image and its name."""
    if not isinstance(source, str | os.PathLike):
        return _read_open_file(io.BytesIO(source), "image bytes", read)
    path = bucket_path(source) or Path(source)
    try:
        file = path.open("rb")
    except OSError as error:
        raise ImageError(f"{path}: can't be read ({error.strerror or error})") from None
    except ValueError:  # a NUL in it
        raise ImageError(f"{short(str(path), 120)}: not a file name") from None
    with file:
        return _read_open_file(file, str(path), read)


def _read_open_file(file: IO[bytes], name: str, read: Callable[[Image.Image, str], T]) -> T:
    with _without_pillow_limit():
        try:
            image = _opened(file)
        except UnidentifiedImageError:
            file.seek(0)
            problem = "not an image in a known format, or damaged at the start" if file.read(1) else "the file is empty"
            if file.tell() and name.lower().endswith((".tif", ".tiff")):
                problem += "; `opensan segment-raster` reads TIFFs of any bands and values"
            raise ImageError(f"{name}: {problem}") from None
        except Exception as error:  # Pillow's readers raise any kind of error on damaged files
            raise ImageError(f"{name}: {_reason(error)}") from None
        with image:
            return read(image, name)


def _opened(file: IO[bytes]) -> Image.Image:
    """Open an image file of a known format. Raises UnidentifiedImageError for any other file."""
    Image.preinit()
    try:
        return Image.open(file, formats=_USUAL_FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        return Image.open(file, formats=_known_formats())


def _decode(image: Image.Image, name: str, max_pixels: int) -> np.ndarray:
    check_size(image.height, image.width, name, max_pixels)
    try:
        image.load()
        upright = _UPRIGHT.get(_orientation(image))
        image = _to_rgb(image)
        return np.array(image if upright is None else image.transpose(upright))
    except MemoryError:  # which says nothing about the image
        raise
    except Exception as error:  # decoders raise any kind of error, and so do conversions of rare modes
        raise ImageError(f"{name}: {_reason(error)}") from None


def check_size(height: int, width: int, name: str, max_pixels: int) -> None:
    """Raise ImageError for an image without pixels, or with more than `max_pixels`."""
    pixels = height * width
    if pixels == 0:
        raise ImageError(f"{name}: no pixels ({width} x {height})")
    if pixels > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} is {pixels:,} pixels, more than the limit of {max_pixels:,}; "
            f"raise it with max_pixels={pixels} (--max-pixels {pixels})"
        )


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # an image with damaged EXIF is still usable
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image of any mode to 8-bit RGB."""
    # Pillow reads 16-bit PGM as 32-bit integers, scaled to 0..65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        to_8_bit = ((np.arange(65_536) + 128) // 257).astype(np.uint8)
        return Image.fromarray(to_8_bit[deep_grey(image)]).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "32-bit integer" if image.mode == "I" else "floating-point"
        raise ImageError(f"{kind} pixels have no known range; convert it to 8 or 16 bits first")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    if image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def _channels_last(tensor: "torch.Tensor") -> np.ndarray:
    array = tensor.detach().cpu()
    if array.ndim == 3 and (array.shape[0] == 3 or (_is_tv_image(tensor) and array.shape[0] in (1, 4))):
        array = array[0] if array.shape[0] == 1 else array.permute(1, 2, 0)
    if str(array.dtype) == "torch.bfloat16":  # numpy has none; any float is refused below
        array = array.float()
    return array.numpy()


def _is_tv_image(tensor: "torch.Tensor") -> bool:
    """Return whether it is a `torchvision.tv_tensors.Image`, whose channels are first, also one (grey) or four."""
    tv_tensors = sys.modules.get("torchvision.tv_tensors")
    return tv_tensors is not None and isinstance(tensor, tv_tensors.Image)


def _from_array(array: np.ndarray, name: str, max_pixels: int) -> np.ndarray:
    name = f"{name} {'x'.join(map(str, array.shape))} {array.dtype}"
    if array.dtype != np.uint8:
        hint = "; for floats in [0, 1] multiply by 255, round and convert" if array.dtype.kind == "f" else ""
        raise ImageError(f"{name}: pixels must be uint8, 0 to 255{hint}")
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        hint = "; numpy images have channels last" if array.ndim == 3 and array.shape[0] in (3, 4) else ""
        hint = "; for a batch give a list of images" if array.ndim == 4 else hint
        raise ImageError(f"{name}: the shape must be HxW, HxWx3 or HxWx4{hint}")
    check_size(array.shape[0], array.shape[1], name, max_pixels)
    if array.ndim == 3 and array.shape[2] == 3:
        return np.array(array, order="C")  # a copy: the caller may reuse the buffer for the next frame
    return np.array(_to_rgb(Image.fromarray(array)))


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ImageError) else f"damaged or unsupported image ({reason(error, 120)})"
