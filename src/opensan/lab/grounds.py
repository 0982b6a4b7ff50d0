"""Paint the grounds of lab scenes: ten textures made from noise, each a class.

Features are sized relative to the image's short side, so a scene looks the same at any size, only finer.
Every painter returns HxWx3 float32 RGB in about 0..255 (the caller clips).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

Painter = Callable[[np.random.Generator, int, int, float], np.ndarray]
"""(rng, H, W, pixels per unit) -> HxWx3; a unit is about 1/128 of the short side."""


def paint_ground(rng: np.random.Generator, name: str, height: int, width: int) -> np.ndarray:
    """Paint the ground `name` (one of GROUNDS): HxWx3 float32 RGB, about 0..255."""
    unit = min(height, width) / 128 * rng.uniform(0.8, 1.35)
    return _PAINTERS[name](rng, height, width, unit)


@lru_cache(maxsize=1)
def _grain() -> np.ndarray:
    """Return white noise, uniform in -1..1, made once; all other noise is cut out of it and magnified."""
    return np.random.default_rng(20221224).uniform(-1, 1, (1536, 1536)).astype(np.float32)


def _noise(rng: np.random.Generator, height: int, width: int, cell_y: float, cell_x: float | None = None) -> np.ndarray:
    """Return smooth noise, HxW in about -1..1, with features of `cell_y` by `cell_x` pixels."""
    cell_y = max(cell_y, height / 1500, 1.0)
    cell_x = max(cell_x if cell_x is not None else cell_y, width / 1500, 1.0)
    rows, columns = int(height / cell_y) + 3, int(width / cell_x) + 3
    grain = _grain()
    top, left = rng.integers(len(grain) - rows), rng.integers(len(grain) - columns)
    cut = grain[top : top + rows, left : left + columns]
    if cell_y == cell_x == 1:
        return cut[:height, :width]
    box = (1, 1, 1 + width / cell_x, 1 + height / cell_y)
    return np.asarray(Image.fromarray(cut).resize((width, height), Image.Resampling.BICUBIC, box=box))


def _clouds(rng: np.random.Generator, height: int, width: int, cell: float, octaves: int) -> np.ndarray:
    """Return fractal noise, HxW in about -1..1: each octave has half the size and strength of the one before."""
    total = _noise(rng, height, width, cell).copy()
    for octave in range(1, octaves):
        total += 0.5**octave * _noise(rng, height, width, cell / 2**octave)
    return total


def _ramp(value: np.ndarray, *stops: Sequence[float]) -> np.ndarray:
    """Interpolate colours between evenly spaced stops, for `value` HxW in -1..1 (clipped)."""
    position = np.clip((value + 1) * (0.5 * (len(stops) - 1)), 0, len(stops) - 1).astype(np.float32)
    colours = np.array(stops, dtype=np.float32)
    result = np.repeat(colours[:1], value.size, axis=0).reshape(*value.shape, 3)
    for number in range(len(stops) - 1):
        share = np.clip(position - number, 0, 1)
        result += share[..., None] * (colours[number + 1] - colours[number])
    return result


def _axes(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None, :]


def _cells(rng: np.random.Generator, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return a random value in -1..1 for each pair of whole numbers in `rows` and `columns` (broadcast together)."""
    table = rng.uniform(-1, 1, (61, 67)).astype(np.float32)
    return table[rows.astype(np.int64) % 61, columns.astype(np.int64) % 67]


def _grass(rng: np.random.Generator, height: int, width: int, unit: float) -> np.ndarray:
    blades = _noise(rng, height, width, 6 * unit, 1.5 * unit) + 0.8 * _noise(rng, height, width, 3.2 * unit, 1.0 * unit)
    meadow = _clouds(rng, height, width, 30 * unit, 2)
    return _ramp(0.55 * blades + 0.4 * meadow, (26, 58, 16), (74, 122, 36), (142, 170, 70))


def _sand(rng: np.random.Generator, height: int, width: int, unit: float) -> np.ndarray:
    y, x = _axes(height, width)
    angle = rng.uniform(-0.5, 0.5)
    dunes = _clouds(rng, height, width, 34 * unit, 2)
    ripples = np.sin((y * np.cos(angle) + x * np.sin(angle)) * (0.55 / unit) + 2.2 * dunes)
    grains = _noise(rng, height, width, 0.9 * unit)
    return _ramp(0.3 * ripples + 0.35 * dunes + 0.3 * grains, (184, 142, 92), (218, 184, 132), (242, 220, 178))


def _water(rng: np.random.Generator, height: int, width: int, unit: float) -> np.ndarray:
    swell = _noise(rng, height, width, 7 * unit, 26 * unit)
    waves = _noise(rng, height, width, 3 * unit, 11 * unit) + 0.5 * _noise(rng, height, width, 1.6 * unit, 5 * unit)
    crest = 1 - 2.4 * np.abs(waves + 0.5 * swell)
    deep = _ramp(0.5 * swell + 0.5 * waves, (10, 66, 96), (26, 112, 142), (72, 164, 184))
    return deep + (np.clip(crest, 0, 1) ** 2 * 70)[..., None] * np.array([0.8, 1, 1], dtype=np.float32)


def _masonry(
    rng: np.random.Generator, height: int, width: int, tall: float, wide: float, joint: float, stagger: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a wall, each HxW: (a value in -1..1 for each block, share of joint in 0..1, distance to the edge)."""
    y, x = _axes(height, width)
    y, x = y / tall + rng.random(), x / wide + rng.random()
    row = np.floor(y)
    x = x + stagger * (row % 2)
    column = np.floor(x)
    edge = np.minimum(np.minimum(y - row, row + 1 - y) * tall, np.minimum(x - column, column + 1 - x) * wide)
    return _cells(rng, row + 0 * column, column), np.clip(joint / 2 + 0.5 - edge, 0, 1), edge


def _brick(rng: np.random.Generator, height: int, width: int, unit: float) -> np.ndarray:
    block, mortar, edge = _masonry(rng, height, width, 11 * unit, 25 * unit, 1.8 * unit, 0.5)
    rough = _clouds(rng, height, width, 5 * unit, 3)
    clay = _ramp(0.55 * block + 0.35 * rough, (104, 46, 34), (152, 74, 54), (188, 112, 84))
    clay *= (0.86 + 0.14 * np.clip(edge / (2 * unit), 0, 1))[..., None]
    lime = np.array([186, 178, 164], dtype=np.float32) + 20 * rough[..., None]
    return clay + mortar[..., None] * (lime - clay)


def _snow(rng: np.random.Generator, height: int, width: int, unit: float) -> np.ndarray:
    drifts = _clouds(rng, height, width, 38 * unit, 3)
    sparkle = np.clip(_noise(rng, height, width, 0.9 * unit) - 0.8, 0, 1) * 90
    snow = _ramp(0.85 * drifts, (178, 198, 226), (222, 232, 244), (250, 251, 253))
    return snow + sparkle[..., None]


def _wood(rng: np.random.Generator, height: int, width: int, unit: float) -> np.ndarray:
    upright = rng.random() < 0.4
    if upright:
        height, width = width, height
    y, _ = _axes(height, width)
    tall = rng.uniform(20, 30) * unit
    plank, gap, _ = _masonry(rng, height, width, tall, 150 * unit, 1.2 * unit, 0.37)
    bend = _noise(rng, height, width, 16 * unit, 60 * unit)
    rings = np.sin((y / unit + 9 * bend + 23 * plank) * 1.1)
    fibre = _noise(rng, height, width, 1.0 * unit, 16 * unit)
    tone = 0.38 * rings + 0.4 * fibre + 0.35 * plank
    wood = _ramp(tone, (92, 54, 26), (150, 98, 54), (196, 146, 94)) * (1 - 0.7 * gap)[..., None]
    return wood.transpose(1, 0, 2).copy() if upright else wood


def _stones(rng: np.random.Generator, height: int, width: int, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Return jittered cells: (a value in -1..1 for each stone, distance to the next stone in about 0..1), each HxW."""
    y, x = _axes(height, width)
    y, x = y / size + 2, x / size + 2
    row, column = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
    shape = (int(row[-1, 0]) + 3, int(column[0, -1]) + 3)
    centre_y = np.arange(shape[0], dtype=np.float32)[:, None] + rng.uniform(0.1, 0.9, shape).astype(np.float32)
    centre_x = np.arange(shape[1], dtype=np.float32)[None, :] + rng.uniform(0.1, 0.9, shape).astype(np.float32)
    tone = rng.uniform(-1, 1, shape).astype(np.float32)
    nearest = np.full((height, width), 9, dtype=np.float32)
    second, value = nearest.copy(), np.zeros((height, width), dtype=np.float32)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            at = np.ix_(row[:, 0] + down, column[0] + right)
            away = (y - centre_y[at]) ** 2 + (x - centre_x[at]) ** 2
            closer = away < nearest
            np.minimum(second, np.maximum(away, nearest), out=second)
            np.minimum(nearest, away, out=nearest)
            value = np.where(closer, tone[at], value)
    return value, np.sqrt(second) - np.sqrt(nearest)


def _gravel(rng: np.random.Generator, height: int, width: int, unit: float) -> np.ndarray:
    stone, inside = _stones(rng, height, width, 7.5 * unit)
    dome = np.clip(inside * 1.7, 0, 1)
    rough = _noise(rng, height, width, 1.2 * unit)
    grey = _ramp(0.75 * stone + 0.25 * rough, (96, 94, 92), (138, 134, 128), (182, 176, 166))
    return grey * (0.32 + 0.72 * dome)[..., None]


def _night_sky(rng: np.random.Generator, height: int, width: int, unit: float) -> np.ndarray:
    glow = _clouds(rng, height, width, 52 * unit, 3)
    sky = _ramp(0.8 * glow - 0.15, (6, 8, 24), (16, 22, 58), (62, 52, 108))
    y, x = _axes(height, width)
    tall, wide = height / unit, width / unit
    for _ in range(int(tall * wide / 420)):
        row, column, size = rng.uniform(0, height), rng.uniform(0, width), unit * rng.uniform(0.35, 0.95)
        reach = int(3 * size) + 2
        window = np.s_[max(int(row) - reach, 0) : int(row) + reach, max(int(column) - reach, 0) : int(column) + reach]
        spark = np.exp(-((y[window[0]] - row) ** 2 + (x[:, window[1]] - column) ** 2) / (2 * (0.6 * size) ** 2))
        sky[window] += (spark * rng.uniform(90, 235))[..., None]
    return sky


def _tiles(rng: np.random.Generator, height: int, width: int, unit: float) -> np.ndarray:
    side = rng.uniform(17, 24) * unit
    tile, joint, edge = _masonry(rng, height, width, side, side, 1.6 * unit, 0)
    glaze = _clouds(rng, height, width, 20 * unit, 2)
    ceramic = _ramp(0.45 * tile + 0.3 * glaze, (112, 158, 152), (150, 190, 182), (190, 218, 210))
    ceramic *= (1.08 - 0.1 * np.clip(edge / (2.5 * unit), 0, 1))[..., None]
    return ceramic + joint[..., None] * (np.array([226, 224, 216], dtype=np.float32) - ceramic)


def _lava(rng: np.random.Generator, height: int, width: int, unit: float) -> np.ndarray:
    flow = _clouds(rng, height, width, 26 * unit, 3)
    heat = np.clip(1 - np.abs(flow) * 4.2, 0, 1)
    rock = _ramp(_clouds(rng, height, width, 6 * unit, 3), (24, 18, 18), (46, 36, 34), (82, 66, 60))
    melt = _ramp(2 * heat - 1, (120, 20, 4), (238, 88, 14), (255, 208, 84))
    return rock + np.clip(heat * 1.6, 0, 1)[..., None] * (melt - rock)


_PAINTERS: dict[str, Painter] = {
    "grass": _grass,
    "sand": _sand,
    "water": _water,
    "brick": _brick,
    "snow": _snow,
    "wood": _wood,
    "gravel": _gravel,
    "night sky": _night_sky,
    "tiles": _tiles,
    "lava": _lava,
}
GROUNDS = tuple(_PAINTERS)
