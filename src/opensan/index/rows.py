"""Encodings of images as rows of tables, and back.

An image has a row in `images`; each of its mask proposals whose mask is not empty has a row in `proposals`, with its
vector in half precision, its contrast and its mask on the model's grid. An exact index also keeps the encoding.

Letters: Q queries, D embedding, h w stride-16 grid, H0 W0 the image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opensan.assemble.bands import to_array
from opensan.assemble.interpolation import interpolation_matrices
from opensan.errors import UserError, reason
from opensan.index.head import REMEDY
from opensan.index.masks import mask_cells, mask_logits, stored_mask
from opensan.jobs.ledger import Stamp
from opensan.segmenters.results import Encoding
from opensan.structures import ImageSizes

if TYPE_CHECKING:
    import pyarrow as pa

NOT_THE_SAME = -1
"""Value of `same_as` for an image with proposals of its own."""

SAMPLES = 4
"""Pixels that stand for all of a cell of the grid, in each direction, where areas are computed."""

_SIZES = ("image", "network", "padded", "grid")
ABOUT = ("id", "path", "size", "mtime_ns", "crc32", "same_as")
SIZES = tuple(f"{name}_{side}" for name in _SIZES for side in ("height", "width"))


@dataclass(frozen=True, slots=True)
class ImageRow:
    """Row of an image in an index, without its sizes and encoding."""

    id: int
    path: str
    """Absolute."""
    stamp: Stamp
    same_as: int = NOT_THE_SAME
    """The id of the image with the same content, whose proposals are its own too."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "ImageRow":
        """Take a row of the table."""
        return cls(row["id"], row["path"], Stamp(row["size"], row["mtime_ns"], row["crc32"]), row["same_as"])

    @property
    def plain(self) -> dict[str, Any]:
        """The row's values in the columns of `ABOUT`."""
        return {"id": self.id, "same_as": self.same_as, **place(self.path, self.stamp)}


def place(path: str, stamp: Stamp) -> dict[str, Any]:
    """Return the columns for a file."""
    return {"path": path, "size": stamp.size, "mtime_ns": stamp.mtime_ns, "crc32": stamp.crc32}


def schemas(width: int) -> dict[str, "pa.Schema"]:
    """Return the schemas of the tables, for vectors of `width` numbers."""
    import pyarrow as pa

    images = [(name, pa.string() if name == "path" else pa.int64()) for name in ABOUT]
    images += [(name, pa.int32()) for name in SIZES]
    images.append(("encoding", pa.large_binary()))
    proposals: list[Any] = [
        ("image", pa.int64()),
        ("query", pa.int16()),
        ("vector", pa.list_(pa.float16(), width)),
        ("area", pa.float32()),
        ("box", pa.list_(pa.int32(), 4)),
        ("mask", pa.binary()),
        ("contrast", pa.float32()),
    ]
    return {"images": pa.schema(images), "proposals": pa.schema(proposals)}


def image_rows(images: Sequence[tuple[ImageRow, Encoding | None]], width: int, exact: bool) -> "pa.Table":
    """Return rows of `images`; an image whose content another has comes without an encoding."""
    import pyarrow as pa
    from safetensors.numpy import save

    rows = []
    for about, encoding in images:
        row = about.plain | dict.fromkeys(SIZES, 0) | {"encoding": None}
        if encoding is not None:
            sizes, grid = encoding.sizes, encoding["mask_logits"].shape[1:]
            sides = (*sizes.image, *sizes.network, *sizes.padded, *grid)
            row |= dict(zip(SIZES, map(int, sides), strict=True))
            if exact:
                row["encoding"] = save({name: to_array(array) for name, array in encoding.arrays.items()})
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=schemas(width)["images"])


def proposal_rows(images: Sequence[tuple[int, Encoding, np.ndarray | None]], width: int) -> "pa.Table":
    """Return rows of `proposals`, of images by id, with the contrasts [Q] of all proposals if they are known."""
    import pyarrow as pa

    schema = schemas(width)["proposals"]
    tables = [_proposals(number, encoding, contrasts, schema) for number, encoding, contrasts in images]
    return pa.concat_tables(tables) if tables else schema.empty_table()


def stored_vectors(encoding: Encoding) -> np.ndarray:
    """Return the vectors of all proposals as they are stored, [Q, D] float16."""
    return to_array(encoding["mask_embeddings"]).astype(np.float16)


def _proposals(number: int, encoding: Encoding, contrasts: np.ndarray | None, schema: "pa.Schema") -> "pa.Table":
    import pyarrow as pa

    logits = to_array(encoding["mask_logits"])
    inside = (logits > 0) & _on_image(encoding.sizes, logits.shape[1:])
    kept = np.flatnonzero(inside.any(axis=(1, 2)))
    boxes = np.stack([_box(mask, encoding.sizes) for mask in inside[kept]]) if len(kept) else np.zeros((0, 4))
    vector, box = schema.field("vector").type, schema.field("box").type
    columns = [
        pa.array(np.full(len(kept), number, dtype=np.int64)),
        pa.array(kept.astype(np.int16)),
        pa.FixedSizeListArray.from_arrays(pa.array(stored_vectors(encoding)[kept].ravel()), vector.list_size),
        pa.array(soft_areas(logits[kept], encoding.sizes)),
        pa.FixedSizeListArray.from_arrays(pa.array(boxes.astype(np.int32).ravel()), box.list_size),
        pa.array([stored_mask(mask) for mask in logits[kept]], pa.binary()),
        pa.nulls(len(kept), pa.float32()) if contrasts is None else pa.array(contrasts[kept]),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def vectors_of(batch: "pa.RecordBatch") -> np.ndarray:
    """Return the vectors of a batch of rows, [n, D] float16."""
    vectors = batch.column("vector")
    return vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(vectors), -1)


def soft_areas(logits: np.ndarray, sizes: ImageSizes) -> np.ndarray:
    """Return each mask's mean probability over the image's pixels, [Q] float32 in [0, 1]; some pixels stand for all."""
    axes = interpolation_matrices((logits.shape[1], logits.shape[2]), sizes)
    down, across = (axis[_middle(len(axis), SAMPLES * axis.shape[1])] for axis in axes)
    resized = down @ logits @ across.T
    return (1 / (1 + np.exp(-resized.clip(-60, 60)))).mean(axis=(1, 2)).astype(np.float32)


def _middle(count: int, most: int) -> np.ndarray:
    """Return at most about `most` of the indices 0..count - 1, evenly spread."""
    step = max(1, count // most)
    return np.arange(step // 2, count, step)


def _on_image(sizes: ImageSizes, grid: tuple[int, ...]) -> np.ndarray:
    """Return which cells of the grid lie on the image, not on its padding: [h, w] bool."""
    rows, columns = (
        np.arange(cells) * padded / cells < network
        for cells, padded, network in zip(grid, sizes.padded, sizes.network, strict=True)
    )
    return rows[:, None] & columns[None]


def _box(mask: np.ndarray, sizes: ImageSizes) -> tuple[int, int, int, int]:
    """Return the box of a mask's cells [h, w], in pixels of the image: left, top, width, height."""
    ends = []
    for axis in (1, 0):
        cells = np.flatnonzero(mask.any(axis=1 - axis))
        scale = sizes.padded[axis] / mask.shape[axis] * sizes.image[axis] / sizes.network[axis]
        end = min(sizes.image[axis], round((cells[-1] + 1) * scale))
        ends.append((min(round(cells[0] * scale), end - 1), end))
    (left, right), (top, bottom) = ends
    return left, top, right - left, bottom - top


def sizes_of(row: Mapping[str, Any]) -> tuple[ImageSizes, tuple[int, int]]:
    """Return an image's sizes and its grid (h, w), of a row with the columns `SIZES`."""
    sides = [(row[f"{name}_height"], row[f"{name}_width"]) for name in _SIZES]
    return ImageSizes(*sides[:3]), sides[3]


def cells_of(row: Mapping[str, Any], stored: Sequence[bytes]) -> list[np.ndarray]:
    """Return which cells stored masks cover, on the image alone: [h, w] bool each.

    `row` is of `images`, with the columns `SIZES` and "path". Raises UserError, one line, if a mask is damaged.
    """
    sizes, grid = sizes_of(row)
    inside = _on_image(sizes, grid)
    try:
        return [mask_cells(mask, grid) & inside for mask in stored]
    except ValueError as error:
        raise _damaged(row, error) from None


def _damaged(row: Mapping[str, Any], error: Exception) -> UserError:
    return UserError(f"{row['path']}: what the index has of it is damaged ({reason(error)}); {REMEDY}")


def encoding_of(row: Mapping[str, Any], proposals: Sequence[Mapping[str, Any]], model: str, width: int) -> Encoding:
    """Return the encoding of an image, as far as it is stored.

    Args:
        row: of `images`, with the columns `SIZES`, "path" and "encoding".
        proposals: its rows of `proposals`, with "query", "vector" and "mask"; they are not read if it has an encoding.
        model: identity in encodings.
        width: numbers of a vector.

    Raises:
        UserError: what is stored is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    sizes, grid = sizes_of(row)
    try:
        if row["encoding"] is not None:
            arrays: Mapping[str, np.ndarray] = load(row["encoding"])
        else:
            ordered = sorted(proposals, key=lambda proposal: proposal["query"])
            masks = [mask_logits(proposal["mask"], grid) for proposal in ordered]
            arrays = {
                "mask_logits": np.asarray(masks, dtype=np.float32).reshape(len(ordered), *grid),
                "mask_embeddings": np.asarray([p["vector"] for p in ordered], np.float32).reshape(len(ordered), width),
            }
    except (SafetensorError, ValueError) as error:
        raise _damaged(row, error) from None
    return Encoding(arrays, sizes, model, stem=Path(row["path"]).stem)
