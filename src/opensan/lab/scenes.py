"""Draw lab scenes: seeded images of textured objects on textured grounds, with exact masks and captions.

Names compose: "[texture] colour shape" for objects ("striped blue star", "red circle") and a word for grounds
("grass", "night sky"). Everything is drawn by this file and `grounds.py`; no photograph is involved.

The words are split in two. BASE words may have masks and captions; NOVEL words only ever have captions. They are
novel for one of four reasons (`novel_kind`): the whole shape is held out, the colour is, only this composition of a
base colour and a base shape is, or the ground is.

A scene depends on nothing but (seed, index, its size and kind), not on scenes drawn before. Letters: H W image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from opensan.errors import UserError
from opensan.lab.grounds import GROUNDS, paint_ground

Split = Literal["captions", "masks", "test"]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (212, 36, 38),
    "orange": (246, 134, 22),
    "yellow": (250, 216, 44),
    "green": (36, 164, 74),
    "blue": (36, 82, 222),
    "purple": (140, 50, 180),
    "white": (244, 244, 242),
    "black": (32, 32, 38),
}
TEXTURES = ("striped", "dotted", "checked")
"""An untextured object has the texture "" and no word for it."""

NOVEL_SHAPES = ("heart", "flower")
NOVEL_COLOURS = ("purple",)
NOVEL_COMPOSITIONS = (
    ("red", "star"),
    ("orange", "ring"),
    ("yellow", "cross"),
    ("green", "triangle"),
    ("blue", "circle"),
    ("white", "moon"),
    ("black", "square"),
)
NOVEL_GROUNDS = ("water", "brick")
NOVEL_KINDS = ("shape", "colour", "composition", "ground")

UNLABELLED = -1


# ---------------------------------------------------------------------------------------------------------- shapes
# Each takes coordinates in object radii (y grows downwards) and gives the signed distance to the outline in radii:
# negative inside. They are exact near the outline, which is all that smooth edges and shading need.


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.92


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.8


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x) * 0.866 - (y + 0.08) * 0.5, y + 0.08) - 0.52


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    sector = np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
    radius = np.hypot(x, y)
    tip, notch = np.array([1.08, 0.0]), 0.46 * np.array([np.cos(sector), np.sin(sector)])
    normal = np.array([notch[1] - tip[1], tip[0] - notch[0]]) / np.hypot(*(notch - tip))
    return (radius * np.cos(angle) - tip[0]) * normal[0] + radius * np.sin(angle) * normal[1]


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x) / 1.55, (0.88 - y) / 1.55
    lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    along = np.maximum(x + y, 0) / 2
    point = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - along) ** 2 + (y - along) ** 2)) * np.sign(x - y)
    return 1.55 * np.where(x + y > 1, lobe, point)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.95, np.minimum(x, y) - 0.3)


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.7) - 0.25


def _moon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x - 0.12, y) - 0.98, 0.84 - np.hypot(x - 0.62, y))


def _flower(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    sector = np.pi / 5
    angle = (np.arctan2(x, -y) + sector) % (2 * sector) - sector
    radius = np.hypot(x, y)
    petal = np.hypot(radius * np.cos(angle) - 0.62, radius * np.sin(angle)) - 0.375
    return np.minimum(petal, radius - 0.5)


_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": _ring,
    "moon": _moon,
    "flower": _flower,
}
SHAPES = tuple(_OUTLINES)


# ----------------------------------------------------------------------------------------------------------- words


def novel_kind(name: str) -> str | None:
    """Return why `name` never has masks: one of NOVEL_KINDS, or None for a base word.

    `name` is a ground, "colour shape", or "texture colour shape". Raises ValueError on anything else.
    """
    if name in GROUNDS:
        return "ground" if name in NOVEL_GROUNDS else None
    *texture, colour, shape = name.split() if len(name.split()) > 1 else ["", name]
    if colour not in COLOURS or shape not in SHAPES or texture not in ([], *([word] for word in TEXTURES)):
        raise UserError(f"not a word of the lab: {name!r}; use a ground, 'colour shape' or 'texture colour shape'")
    if shape in NOVEL_SHAPES:
        return "shape"
    if colour in NOVEL_COLOURS:
        return "colour"
    return "composition" if (colour, shape) in NOVEL_COMPOSITIONS else None


OBJECT_NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
SEGMENTATION_NAMES = (*OBJECT_NAMES, *GROUNDS)
"""The classes of the evaluation: every "colour shape", then every ground."""
BASE_NAMES = tuple(name for name in SEGMENTATION_NAMES if novel_kind(name) is None)
NOVEL_NAMES = tuple(name for name in SEGMENTATION_NAMES if novel_kind(name) is not None)


@dataclass(frozen=True)
class SceneRegion:
    """One region of a scene: a ground, or an object of a texture ("" for none), colour and shape."""

    ground: str = ""
    texture: str = ""
    colour: str = ""
    shape: str = ""
    radius: float = 0.0
    """Radius of an object in pixels."""
    centre: tuple[float, float] = (0.0, 0.0)
    """Centre (y, x) of an object in pixels."""

    @property
    def name(self) -> str:
        """The class name: "colour shape" or the ground."""
        return self.ground or f"{self.colour} {self.shape}"

    @property
    def full_name(self) -> str:
        """The class name with the texture, where there is one."""
        return f"{self.texture} {self.name}".strip()


@dataclass(frozen=True)
class Scene:
    """An image with its labels and regions."""

    image: np.ndarray
    """HxWx3 uint8 RGB."""
    index_map: np.ndarray
    """HxW uint8: each pixel's index into `regions`."""
    regions: tuple[SceneRegion, ...]
    """Grounds first, then objects from back to front."""

    @property
    def grounds(self) -> tuple[SceneRegion, ...]:
        """The regions that are grounds."""
        return tuple(region for region in self.regions if region.ground)

    @property
    def objects(self) -> tuple[SceneRegion, ...]:
        """The regions that are objects, from back to front."""
        return tuple(region for region in self.regions if not region.ground)


def label_map(scene: Scene, names: Sequence[str] = SEGMENTATION_NAMES) -> np.ndarray:
    """Return HxW int32: each pixel's index into `names`, UNLABELLED (-1) where no name applies.

    A region takes the most exact of its names that is listed: "striped blue star" before "blue star" before "star".
    """
    index = {name: position for position, name in enumerate(names)}

    def label(region: SceneRegion) -> int:
        candidates = (region.full_name, region.name, region.shape)
        return next((index[name] for name in candidates if name in index), UNLABELLED)

    return np.array([label(region) for region in scene.regions], dtype=np.int32)[scene.index_map]


# ---------------------------------------------------------------------------------------------------------- scenes


def make_scene(
    seed: int,
    index: int,
    size: tuple[int, int] = (128, 128),
    *,
    split: Split = "captions",
    objects: tuple[int, int] = (1, 5),
    radius: tuple[float, float] = (0.11, 0.24),
    alike: float = 0.0,
) -> Scene:
    """Draw scene `index` of the endless sequence that `seed` names.

    `size` is (H, W) in pixels, `objects` the least and most objects, `radius` their least and greatest size as a
    share of the short side; `alike` is the probability that an object has the texture, colour and shape of the one
    before it, so that several objects have one name. `split="masks"` draws base words only; the others draw from
    all words.
    """
    rng = np.random.default_rng([seed, index])
    height, width = size
    image, index_map, regions = paint_grounds(rng, height, width, split)
    light = rng.uniform(0, 2 * np.pi)
    count = int(rng.integers(objects[0], objects[1] + 1))
    for new in place_objects(rng, height, width, split, count, radius, alike):
        paint_object(rng, image, index_map, new, len(regions), light)
        regions.append(new)
    return Scene(develop(rng, image, light), index_map, tuple(regions))


def _draw(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def paint_grounds(
    rng: np.random.Generator, height: int, width: int, split: Split
) -> tuple[np.ndarray, np.ndarray, list[SceneRegion]]:
    """Paint one ground, or (one scene in four) two that meet at a curved horizon. Float RGB in 0..255."""
    words = [name for name in GROUNDS if split != "masks" or name not in NOVEL_GROUNDS]
    near = _draw(rng, words)
    image = paint_ground(rng, near, height, width)
    index_map = np.zeros((height, width), dtype=np.uint8)
    if rng.random() > 0.25 or min(height, width) < 64:
        return image, index_map, [SceneRegion(ground=near)]
    far = _draw(rng, [name for name in words if name != near])
    across = np.arange(width, dtype=np.float32) / width
    horizon = np.full(width, rng.uniform(0.25, 0.6)) + sum(
        rng.normal(0, 0.035 / turns) * np.sin(2 * np.pi * (turns * across + rng.random())) for turns in (0.5, 1, 2, 5)
    )
    above = (horizon * height)[None, :] - np.arange(height, dtype=np.float32)[:, None]
    share = np.clip(above + 0.5, 0, 1)[..., None]
    # The near ground darkens a little under the edge, so that one is seen to lie before the other.
    image *= 1 - 0.3 * np.exp(-np.abs(above) / (0.03 * height))[..., None].astype(np.float32)
    image += share.astype(np.float32) * (paint_ground(rng, far, height, width) - image)
    index_map[above > 0] = 1
    return image, index_map, [SceneRegion(ground=near), SceneRegion(ground=far)]


def place_objects(
    rng: np.random.Generator,
    height: int,
    width: int,
    split: Split,
    count: int,
    radius: tuple[float, float],
    alike: float = 0.0,
) -> list[SceneRegion]:
    """Choose objects and positions; they may touch and overlap a little, but never hide one another."""
    short = min(height, width)
    largest = radius[1] if count <= 3 else (radius[0] + radius[1]) / 2
    placed: list[SceneRegion] = []
    for _ in range(count):
        for _attempt in range(12):
            size = short * rng.uniform(radius[0], largest)
            margin = min(0.75 * size, 0.45 * short)
            y, x = rng.uniform(margin, height - margin), rng.uniform(margin, width - margin)
            if all(
                np.hypot(y - other.centre[0], x - other.centre[1]) > 0.86 * (size + other.radius) for other in placed
            ):
                break
        else:
            continue
        texture = _draw(rng, TEXTURES) if rng.random() < 0.5 else ""
        colour, shape = _draw(rng, tuple(COLOURS)), _draw(rng, SHAPES)
        while split == "masks" and novel_kind(f"{colour} {shape}"):
            colour, shape = _draw(rng, tuple(COLOURS)), _draw(rng, SHAPES)
        if placed and alike and rng.random() < alike:
            texture, colour, shape = placed[-1].texture, placed[-1].colour, placed[-1].shape
        placed.append(SceneRegion(texture=texture, colour=colour, shape=shape, radius=size, centre=(y, x)))
    return sorted(placed, key=lambda region: region.centre[0])


def paint_object(
    rng: np.random.Generator, image: np.ndarray, index_map: np.ndarray, region: SceneRegion, number: int, light: float
) -> None:
    """Paint `region` and its shadow into `image` and its pixels into `index_map`, in place."""
    height, width = index_map.shape
    (y, x), size = region.centre, region.radius
    reach = 1.5 * size + 2
    top, left = max(int(y - reach), 0), max(int(x - reach), 0)
    window = np.s_[top : min(int(y + reach) + 2, height), left : min(int(x + reach) + 2, width)]
    patch = image[window]
    rows = np.arange(top, top + patch.shape[0], dtype=np.float32)[:, None] - np.float32(y)
    columns = np.arange(left, left + patch.shape[1], dtype=np.float32)[None, :] - np.float32(x)
    turn = rng.uniform(-np.pi, np.pi) if rng.random() < 0.3 else rng.uniform(-0.6, 0.6)
    stretch = rng.uniform(0.9, 1.1)
    cos, sin = np.float32(np.cos(turn) / size), np.float32(np.sin(turn) / size)

    def local(down: float, right: float) -> tuple[np.ndarray, np.ndarray]:
        """Return coordinates in the object's own frame, the object moved by (down, right) pixels."""
        across, along = columns - np.float32(right), rows - np.float32(down)
        return (across * cos + along * sin) * np.float32(stretch), (along * cos - across * sin) / np.float32(stretch)

    outline = _OUTLINES[region.shape]
    drop = rng.uniform(0.06, 0.14) * size
    shadow = outline(*local(-drop * np.sin(light), -drop * np.cos(light))) * size
    softness = max(0.22 * size, 2.0)
    patch *= (1 - rng.uniform(0.3, 0.5) * np.clip(0.5 - shadow / softness, 0, 1)[..., None]).astype(np.float32)

    u, v = local(0, 0)
    distance = outline(u, v) * np.float32(size)
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    surface = _surface(rng, region, u, v)
    surface *= _relief(rng, distance, rows, columns, size, light)[..., None]
    patch += cover.astype(np.float32) * (surface - patch)
    index_map[window][distance < 0] = number


def _surface(rng: np.random.Generator, region: SceneRegion, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the object's paint before lighting: its colour, with a paler or darker shade in the texture's pattern."""
    pure = np.array(COLOURS[region.colour], dtype=np.float32)
    colour = pure * rng.uniform(0.9, 1.08) + rng.normal(0, 6, 3)
    if not region.texture:
        return np.broadcast_to(colour.astype(np.float32), (*u.shape, 3)).copy()
    # White has no paler shade and black no darker one; yellow and orange turn into other colours when darkened.
    darken = region.colour == "white" or (region.colour not in ("black", "yellow", "orange") and rng.random() < 0.5)
    if darken:
        other = colour * (0.68 if region.colour == "white" else 0.42)
    else:
        other = colour + (0.4 if region.colour == "black" else 0.68) * (255 - colour)
    period = rng.uniform(0.36, 0.52)
    angle = rng.uniform(0, np.pi)
    u, v = u * np.cos(angle) + v * np.sin(angle), v * np.cos(angle) - u * np.sin(angle)
    phase = rng.random(2)
    if region.texture == "striped":
        wave = np.sin(2 * np.pi * (u / period + phase[0]))
    elif region.texture == "checked":
        wave = np.sin(np.pi * (u / (0.8 * period) + phase[0])) * np.sin(np.pi * (v / (0.8 * period) + phase[1])) * 2.5
    else:
        row = np.floor(v / period + phase[1])
        across = (u / period + phase[0] + 0.5 * (row % 2)) % 1 - 0.5
        wave = (0.3 - np.hypot(across, (v / period + phase[1]) % 1 - 0.5)) * 6
    share = np.clip(0.5 + wave * 2.2, 0, 1)[..., None].astype(np.float32)
    return (colour + share * (other - colour)).astype(np.float32)


def _relief(
    rng: np.random.Generator, distance: np.ndarray, rows: np.ndarray, columns: np.ndarray, size: float, light: float
) -> np.ndarray:
    """Return brightness factors that make the flat shape look like a cushion lit from the angle `light`."""
    depth = rng.uniform(0.16, 0.3)
    towards = (np.float32(np.sin(light)) * rows + np.float32(np.cos(light)) * columns) / np.float32(size)
    rim = np.exp(np.minimum(distance, 0) * np.float32(1 / (0.13 * size)))
    return (1 + depth * np.clip(towards, -1, 1) * (0.35 + 0.65 * rim) - 0.16 * rim).astype(np.float32)


def develop(rng: np.random.Generator, image: np.ndarray, light: float) -> np.ndarray:
    """Add the camera's effects in place (uneven light, colour cast, exposure, grain) and return uint8."""
    height, width, _ = image.shape
    down = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    right = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    slope = rng.uniform(0, 0.14)
    bright = 1 + slope * (np.sin(light) * down + np.cos(light) * right) - rng.uniform(0, 0.06) * (down**2 + right**2)
    cast = rng.uniform(0.86, 1.08) * rng.normal(1, 0.02, 3)
    image *= bright.astype(np.float32)[..., None]
    image *= cast.astype(np.float32)
    image += rng.uniform(0, 5) * rng.standard_normal((height, width, 1), dtype=np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)
