"""Draw films with exact labels and exact motion: a camera pans and zooms over a ground on which objects move."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from opensan.lab.scenes import Scene, SceneRegion, Split, develop, paint_grounds, paint_object, place_objects


@dataclass(frozen=True)
class FilmFrame:
    """A frame with its labels and its motion."""

    scene: Scene
    before: np.ndarray
    """[H, W, 2] int: row and column of the same point in the frame before; -1 where it was not visible."""


def make_film(
    seed: int,
    index: int,
    frames: int,
    size: tuple[int, int] = (240, 320),
    *,
    split: Split = "test",
    objects: tuple[int, int] = (4, 7),
    speed: float = 0.006,
    grain: float = 6.0,
) -> Iterator[FilmFrame]:
    """Draw film `index` of the endless sequence that `seed` names.

    `speed` is how far the camera and each object move from frame to frame, at most, as a share of the short side;
    `grain` the deviation of each frame's own noise, in grey levels.
    """
    rng = np.random.default_rng([seed, index])
    height, width = size
    canvas = (2 * height, 2 * width)  # the camera shows about half of it
    ground, ground_map, regions = paint_grounds(rng, *canvas, split)
    light = rng.uniform(0, 2 * np.pi)
    count = int(rng.integers(objects[0], objects[1] + 1))
    placed = place_objects(rng, *canvas, split, count, (0.08, 0.16))
    still = len(regions)
    limit = speed * min(size)
    steps = np.concatenate([np.zeros((still, 2)), rng.uniform(-limit, limit, (len(placed), 2))])
    paints = rng.integers(1 << 32, size=len(placed))
    develops = int(rng.integers(1 << 32))
    pan, zoom = rng.uniform(-limit, limit, 2), rng.uniform(-1, 1) * speed
    view_before: _View | None = None
    index_map_before = ground_map[:0]
    for number in range(frames):
        image, index_map = ground.copy(), ground_map.copy()
        for number_of_object, region in enumerate(placed):
            centre = tuple(np.array(region.centre) + number * steps[still + number_of_object])
            paint = np.random.default_rng(paints[number_of_object])
            paint_object(paint, image, index_map, replace(region, centre=centre), still + number_of_object, light)
        offset = number - frames / 2
        view = _View(np.array(canvas) / 2 + offset * pan, 1.3 * np.exp(offset * zoom), size)
        shown, seen = view.of(image, Image.Resampling.BILINEAR), view.of(index_map, Image.Resampling.NEAREST)
        shown = develop(np.random.default_rng(develops), shown, light).astype(np.float32)
        shown += grain * rng.standard_normal((height, width, 1), dtype=np.float32)
        before = np.full((height, width, 2), -1)
        if view_before is not None:
            before = view_before.find(view.points() - steps[seen], seen, index_map_before)
        yield FilmFrame(Scene(shown.clip(0, 255).astype(np.uint8), seen, (*regions, *_at(placed))), before)
        view_before, index_map_before = view, seen


def _at(placed: list[SceneRegion]) -> list[SceneRegion]:
    """Return the objects without their position, which changes from frame to frame."""
    return [replace(region, centre=(0.0, 0.0)) for region in placed]


@dataclass(frozen=True)
class _View:
    """The rectangle of the canvas that the camera shows."""

    centre: np.ndarray
    """(y, x) on the canvas."""
    scale: float
    """Canvas pixels per frame pixel."""
    size: tuple[int, int]

    @property
    def corner(self) -> np.ndarray:
        return self.centre - self.scale * np.array(self.size) / 2

    def points(self) -> np.ndarray:
        """Return [H, W, 2]: the canvas positions of the pixels' centres."""
        grid = np.moveaxis(np.indices(self.size), 0, -1) + 0.5
        return self.corner + self.scale * grid

    def of(self, canvas: np.ndarray, resampling: Image.Resampling) -> np.ndarray:
        """Return the canvas, [H', W'] or [H', W', C], as this view shows it."""
        (y, x), (height, width) = self.corner, self.size
        affine = (self.scale, 0, x, 0, self.scale, y)
        channels = canvas[..., None] if canvas.ndim == 2 else canvas
        shown = [
            np.asarray(Image.fromarray(channel).transform((width, height), Image.Transform.AFFINE, affine, resampling))
            for channel in np.moveaxis(channels, -1, 0)
        ]
        return shown[0] if canvas.ndim == 2 else np.stack(shown, axis=-1)

    def find(self, points: np.ndarray, regions: np.ndarray, index_map: np.ndarray) -> np.ndarray:
        """Return [H, W, 2] int: the pixels that show the canvas `points`; -1 where they show another region or none."""
        pixels = np.floor((points - self.corner) / self.scale).astype(int)
        inside = ((pixels >= 0) & (pixels < self.size)).all(axis=-1)
        pixels[~inside] = 0
        same = inside & (index_map[pixels[..., 0], pixels[..., 1]] == regions)
        pixels[~same] = -1
        return pixels
