"""Draw lab scenes with depth: objects that stand on a floor before a wall, in perspective, with exact distances.

The camera looks level, 1.5 m above the floor, through a lens whose focal length is the image's height. How high the
horizon lies in the image and how far the wall is differ from scene to scene. Distances are along the viewing axis.
A scene depends on nothing but (seed, index, size). Letters: H W image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opensan.lab.grounds import GROUNDS, paint_ground
from opensan.lab.scenes import COLOURS, SHAPES, TEXTURES, SceneRegion, develop, paint_object

CAMERA_HEIGHT = 1.5
"""Metres of the camera above the floor."""

HORIZONS = (0.2, 0.45)
"""Rows of the horizon, in image heights from the top."""

WALLS = (6.0, 12.0)
"""Distances of the wall, in metres."""

RADII = (0.25, 0.45)
"""Radii of the objects, in metres."""

NEAREST = 2.2
"""Distance of the nearest object, in metres."""

WALL_BRIGHTNESS = 0.8
TEXELS, TEXEL = 256, 0.025
"""Side of a surface's texture in pixels, and of its pixel in metres; beyond its edge it is mirrored."""
SAMPLES = 3
"""Samples of a texture along each side of an image pixel."""


@dataclass(frozen=True)
class View:
    """The camera's view and the surfaces in it."""

    horizon: float
    """Row of the horizon, in image heights from the top."""
    wall: float
    """Distance of the wall in metres."""
    floor_ground: str
    """One of GROUNDS."""
    wall_ground: str
    """One of GROUNDS."""


@dataclass(frozen=True)
class Standing:
    """An object that stands upright on the floor, facing the camera."""

    distance: float
    """Metres."""
    across: float
    """Metres to the right of the image's middle."""
    radius: float
    """Metres."""
    texture: str = ""
    colour: str = "red"
    shape: str = "circle"


@dataclass(frozen=True)
class DepthScene:
    """An image and the distance of all that it shows."""

    image: np.ndarray
    """[H, W, 3] uint8 RGB."""
    depth: np.ndarray
    """[H, W] float32: metres along the viewing axis."""
    on_object: np.ndarray
    """[H, W] bool: whether the pixel shows an object, not the floor or the wall."""


def make_depth_scene(
    seed: int, index: int, size: tuple[int, int] = (96, 96), grounds: Sequence[str] = GROUNDS
) -> DepthScene:
    """Draw scene `index` of the endless sequence that `seed` names; `size` is (H, W) in pixels."""
    rng = np.random.default_rng([seed, index])
    floor, wall = (grounds[number] for number in rng.choice(len(grounds), 2, replace=False))
    view = View(rng.uniform(*HORIZONS), rng.uniform(*WALLS), floor, wall)
    objects = []
    for _ in range(int(rng.integers(3, 8))):
        distance = float(np.exp(rng.uniform(np.log(NEAREST), np.log(view.wall - 0.5))))
        half_view = 0.5 * distance * size[1] / size[0]
        objects.append(
            Standing(
                distance,
                rng.uniform(-0.9, 0.9) * half_view,
                rng.uniform(*RADII),
                _draw(rng, TEXTURES) if rng.random() < 0.5 else "",
                _draw(rng, tuple(COLOURS)),
                _draw(rng, SHAPES),
            )
        )
    return draw_depth_scene(rng, view, objects, size)


def _draw(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def draw_depth_scene(
    rng: np.random.Generator, view: View, objects: Sequence[Standing], size: tuple[int, int]
) -> DepthScene:
    """Draw a scene of `size` (H, W) pixels; nearer objects cover farther ones."""
    height, width = size
    light = rng.uniform(0, 2 * np.pi)
    surfaces = surface_distances(view, height)
    image = _paint_surfaces(rng, view, size)
    shown = np.zeros(size, dtype=np.uint8)  # 0: floor and wall; n: the n-th object
    ordered = sorted(objects, key=lambda one: -one.distance)
    for number, one in enumerate(ordered, 1):
        scale = height / one.distance  # pixels a metre
        row = view.horizon * height + (CAMERA_HEIGHT - one.radius) * scale
        column = 0.5 * width + one.across * scale
        region = SceneRegion(
            texture=one.texture,
            colour=one.colour,
            shape=one.shape,
            radius=one.radius * scale,
            centre=(row - 0.5, column - 0.5),
        )
        paint_object(rng, image, shown, region, number, light)
    distances = np.array([0, *(one.distance for one in ordered)], dtype=np.float32)
    depth = np.where(shown > 0, distances[shown], surfaces[:, None])
    return DepthScene(develop(rng, image, light), depth.astype(np.float32), shown > 0)


def surface_distances(view: View, height: int, samples: int = 1) -> np.ndarray:
    """Return the distance of floor and wall in each row, [height * samples] float64: metres, at the row's middle.

    The floor is `CAMERA_HEIGHT` below the camera, so a row that lies a share s of the image's height below the horizon
    shows it at CAMERA_HEIGHT / s metres, unless the wall is nearer.
    """
    below = (np.arange(height * samples) + 0.5) / (height * samples) - view.horizon
    return CAMERA_HEIGHT / np.maximum(below, CAMERA_HEIGHT / view.wall)


def _paint_surfaces(rng: np.random.Generator, view: View, size: tuple[int, int]) -> np.ndarray:
    """Paint floor and wall in perspective, without objects: [H, W, 3] float32 RGB in about 0..255."""
    height, width = size
    distances = surface_distances(view, height, SAMPLES)[:, None]
    below = ((np.arange(height * SAMPLES) + 0.5) / (height * SAMPLES) - view.horizon)[:, None]
    across = ((np.arange(width * SAMPLES) + 0.5) / SAMPLES - 0.5 * width) / height * distances
    is_wall = below * view.wall < CAMERA_HEIGHT
    floor, wall = (paint_ground(rng, name, TEXELS, TEXELS) for name in (view.floor_ground, view.wall_ground))
    along = np.where(is_wall, below * view.wall, distances)  # metres downwards on the wall, or away on the floor
    rows, columns = (_mirrored(metres + rng.uniform(0, TEXELS * TEXEL)) for metres in (along, across))
    rows = np.broadcast_to(rows, columns.shape)
    samples = np.where(is_wall[..., None], WALL_BRIGHTNESS * wall[rows, columns], floor[rows, columns])
    return samples.reshape(height, SAMPLES, width, SAMPLES, 3).mean(axis=(1, 3)).astype(np.float32)


def _mirrored(metres: np.ndarray) -> np.ndarray:
    """Return the texture's row or column at a place in metres."""
    texel = np.floor(metres / TEXEL).astype(np.int64) % (2 * TEXELS)
    return np.where(texel < TEXELS, texel, 2 * TEXELS - 1 - texel)
