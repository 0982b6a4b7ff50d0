"""Augment training images as SAN does: scale, crop, SSD colour jitter, flip, padding. One generator draws all.

Scale and crop are done in one resampling of the crop alone, which gives the same pixels (to 2 levels of 255)
as resizing the whole image first, because Pillow's filters look beyond the box, at a fraction of the time.
"""

from typing import Annotated

import numpy as np
from PIL import Image, ImageFilter
from pydantic import Field

from opensan.config import Config, Count, ImageConfig
from opensan.images import network_size
from opensan.vocabulary import UNLABELLED

PADDING_GREY = 128
"""Grey that fills crops beyond the resized image, before normalisation (the official recipe)."""


class AugmentConfig(Config):
    """Augmentation of training images. The defaults are SAN's."""

    short_sides: Annotated[tuple[Count, ...], Field(min_length=1)] = tuple(range(320, 961, 64))
    """The short side in pixels is drawn from these."""
    long_side: Count = 2_560
    """Limit of the long side; it overrides the short side."""
    crop: tuple[Count, Count] = (640, 640)
    """Height and width of the network's input."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of a horizontal flip."""
    colour_jitter: bool = True
    """SSD's changes of brightness, contrast, saturation and hue, each with probability 1/2."""


def augment(
    image: np.ndarray, labels: np.ndarray, config: AugmentConfig, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return a random training crop of an image.

    Args:
        image: [H, W, 3] uint8 RGB.
        labels: [H, W] int16, -1 unlabelled.

    Returns:
        The crop [h, w, 3] uint8 and its labels [h, w] int16, of the configured size.
    """
    short_side = int(generator.choice(config.short_sides))
    scaled = network_size(image.shape[:2], ImageConfig(short_side=short_side, long_side=config.long_side))
    size = (min(scaled[0], config.crop[0]), min(scaled[1], config.crop[1]))
    top, left = (int(generator.integers(side - part + 1)) for side, part in zip(scaled, size, strict=True))
    image = _resize_crop(image, scaled, (top, left), size)
    labels = _resize_crop_labels(labels, scaled, (top, left), size)
    if config.colour_jitter:
        image = jitter_colours(image, generator)
    if generator.random() < config.flip:
        image, labels = image[:, ::-1], labels[:, ::-1]
    if size == config.crop:
        return image, labels
    missing = [(0, limit - part) for limit, part in zip(config.crop, size, strict=True)]
    return (
        np.pad(image, [*missing, (0, 0)], constant_values=PADDING_GREY),
        np.pad(labels, missing, constant_values=UNLABELLED),
    )


def two_views(
    image: np.ndarray, config: AugmentConfig, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a random crop of an image without labels as it is, the same crop changed strongly, and where it is.

    The crop is scaled, placed and flipped as that of a labelled image. The strong change has its colour jitter (of
    brightness and contrast alone without `colour_jitter`, where words may name colours), a blur with probability 1/2,
    and noise with probability 1/2.

    Args:
        image: [H, W, 3] uint8 RGB.
        config: the augmentation of training images.
        generator: the source of all random numbers.

    Returns:
        Both views [h, w, 3] uint8 of the configured size, and [h, w] bool: false on padding.
    """
    still = config.model_copy(update={"colour_jitter": False})
    plain, inside = augment(image, np.zeros(image.shape[:2], dtype=np.int16), still, generator)
    strong = jitter_colours(plain, generator, hues=config.colour_jitter)
    if generator.random() < 0.5:
        radius = generator.uniform(0.3, 2.0)
        strong = np.asarray(Image.fromarray(strong).filter(ImageFilter.GaussianBlur(radius)))
    if generator.random() < 0.5:
        noise = generator.normal(0, generator.uniform(2, 14), (*strong.shape[:2], 1))
        strong = np.clip(strong + noise, 0, 255).astype(np.uint8)
    return plain, strong, inside != UNLABELLED


def _resize_crop(
    image: np.ndarray, scaled: tuple[int, int], start: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Return [start, start + size) of `image` resized to `scaled`, bilinearly with antialias, as uint8."""
    (height, width), (top, left), (rows, columns) = scaled, start, size
    y, x = image.shape[0] / height, image.shape[1] / width
    box = (left * x, top * y, min((left + columns) * x, image.shape[1]), min((top + rows) * y, image.shape[0]))
    resized = Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized)


def _resize_crop_labels(
    labels: np.ndarray, scaled: tuple[int, int], start: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Return [start, start + size) of `labels` resized to `scaled`, by nearest pixels."""
    rows, columns = (
        ((np.arange(part) + first + 0.5) * (whole / side)).astype(np.intp)
        for part, first, whole, side in zip(size, start, labels.shape, scaled, strict=True)
    )
    return labels[rows[:, None], columns]


def jitter_colours(image: np.ndarray, generator: np.random.Generator, *, hues: bool = True) -> np.ndarray:
    """Apply SSD's photometric distortion (Liu et al., ECCV 2016) to an image [H, W, 3] uint8 RGB.

    Each with probability 1/2: brightness +-32, contrast x 0.5..1.5, saturation x 0.5..1.5, hue +-36 degrees; contrast
    comes before or after the other two, with equal chance. Without `hues`, saturation and hue stay as they are.
    """
    brightness = generator.uniform(-32, 32) if generator.random() < 0.5 else 0.0
    contrast = generator.uniform(0.5, 1.5) if generator.random() < 0.5 else 1.0
    contrast_first = generator.random() < 0.5
    saturation = generator.uniform(0.5, 1.5) if generator.random() < 0.5 else 1.0
    # Pillow's hue circle has 256 steps.
    hue = round(generator.uniform(-36, 36) / 360 * 256) if generator.random() < 0.5 else 0
    saturation, hue = (saturation, hue) if hues else (1.0, 0)
    levels = np.clip(np.arange(256) + brightness, 0, 255)
    if contrast_first:
        levels = np.clip(levels * contrast, 0, 255)
    first, last = levels.astype(np.uint8), _scaled_levels(1.0 if contrast_first else contrast)
    picture = Image.fromarray(image)
    if saturation == 1.0 and not hue:
        return np.asarray(_change_levels(picture, last[first]))
    hsv = _change_levels(picture, first).convert("HSV")
    turned = (np.arange(256) + hue) % 256  # wraps around, as hue does
    hsv = hsv.point([*turned.tolist(), *_scaled_levels(saturation).tolist(), *range(256)])
    return np.asarray(_change_levels(hsv.convert("RGB"), last))


def _scaled_levels(factor: float) -> np.ndarray:
    """Return every level 0..255 times `factor`, [256] uint8."""
    return np.clip(np.arange(256) * factor, 0, 255).astype(np.uint8)


def _change_levels(picture: Image.Image, levels: np.ndarray) -> Image.Image:
    """Replace level v of every channel by levels[v]."""
    return picture if (levels == np.arange(256)).all() else picture.point(levels.tolist() * 3)
