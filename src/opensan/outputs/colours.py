"""Choose a colour for each class: the same in every picture, and distinct for colour-blind readers where possible."""

import functools

import numpy as np

UNLABELLED_COLOUR = (0, 0, 0)

# Okabe and Ito's palette for colour-blind readers, without its black; strongest first.
_FIRST = [
    (230, 159, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (213, 94, 0),
    (240, 228, 66),
]

# Pure hues, far apart for normal vision.
_FIRST_VIVID = [
    (230, 25, 75),
    (0, 130, 245),
    (60, 180, 75),
    (255, 200, 0),
    (145, 30, 220),
    (255, 120, 20),
    (0, 200, 200),
    (240, 50, 230),
]

SAFE, VIVID = "colour-blind safe", "vivid"
PALETTES = (SAFE, VIVID)
"""Names of palettes, the default first."""

_SPREAD = 256
"""Colours chosen one by one to be far from all earlier ones; colours beyond are only all different."""

# Linear RGB as protanopes and deuteranopes see it (Viénot, Brettel and Mollon, 1999).
_BLINDNESS = [
    [[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]],
    [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]],
]


def rgb(colour: np.ndarray) -> tuple[int, int, int]:
    """Return a colour [3] as Pillow takes it."""
    red, green, blue = map(int, colour)
    return red, green, blue


def palette(count: int, name: str = SAFE) -> np.ndarray:
    """Return colours [count, 3] uint8 RGB, all different up to 200,000. A class's colour does not depend on `count`.

    `name`: one of PALETTES.
    """
    colours = _spread_colours(name)
    if count <= len(colours):
        return colours[:count]
    # An odd multiplier makes a permutation of 18 bits; the golden ratio's keeps neighbours far apart. Each channel
    # takes every third bit. Levels are 2 modulo 3, which the candidates of _spread_colours never are.
    code = (np.arange(count - len(colours), dtype=np.int64) * 162_013) % 2**18
    channels = [sum(((code >> (3 * bit + channel)) & 1) << bit for bit in range(6)) for channel in range(3)]
    return np.concatenate([colours, (32 + 3 * np.stack(channels, axis=1)).astype(np.uint8)])


@functools.cache
def _spread_colours(name: str) -> np.ndarray:
    """Return [256, 3] uint8: a palette's first colours, then always the candidate farthest from all chosen before."""
    first, views = (_FIRST, _views) if name == SAFE else (_FIRST_VIVID, _normal_view)
    levels = np.arange(0, 256, 15)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    # Not so dark that a colour looks like a border, nor so pale or grey that it looks like the image.
    lightness, a, b = _lab(_linear(candidates)).T
    candidates = candidates[(lightness > 35) & (lightness < 88) & (np.hypot(a, b) > 40)]
    colours = [np.array(colour) for colour in first]
    seen, candidate_views = views(np.array(colours)), views(candidates)
    distance = np.min([_distance(candidate_views, seen[:, i]) for i in range(len(colours))], axis=0)
    while len(colours) < _SPREAD:
        farthest = int(distance.argmax())
        colours.append(candidates[farthest])
        distance = np.minimum(distance, _distance(candidate_views, candidate_views[:, farthest]))
    return np.array(colours, dtype=np.uint8)


def _distance(views: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the distance of colours [V, n, 3] from `reference` [V, 3]: half normal vision's, half the worst."""
    each = np.linalg.norm(views - reference[:, None], axis=-1)
    return 0.5 * each[0] + 0.5 * each.min(axis=0)


def _views(colours: np.ndarray) -> np.ndarray:
    """Return CIELAB of colours [n, 3] as seen with normal, protanope and deuteranope vision, [3, n, 3]."""
    linear = _linear(colours)
    return np.stack([_lab(linear), *(_lab((linear @ np.array(m).T).clip(0, 1)) for m in _BLINDNESS)])


def _normal_view(colours: np.ndarray) -> np.ndarray:
    """Return CIELAB of colours [n, 3] as seen with normal vision, [1, n, 3]."""
    return _lab(_linear(colours))[None]


def _linear(colours: np.ndarray) -> np.ndarray:
    """Convert sRGB 0..255 to linear 0..1 (IEC 61966-2-1)."""
    c = np.asarray(colours) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def _lab(linear: np.ndarray) -> np.ndarray:
    """Convert linear sRGB to CIELAB (D65)."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = linear @ np.array(to_xyz).T / [0.9505, 1.0, 1.089]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)
