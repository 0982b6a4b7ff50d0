"""One map of labels, given in every form, comes out of each the same."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opensan.data.prepare import READERS
from opensan.data.prepare.engine import prepare
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.outputs.coco import run_lengths

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared" / "data"


class OneMap:
    """A photograph with its labels [H, W] (-1 unlabelled) and classes, to be written in every form there is."""

    def __init__(self, image: bytes, labels: np.ndarray, names: list[str]) -> None:
        self.image = image
        self.labels = labels
        self.names = names

    def folder(self, root: Path) -> None:
        self._photograph(root / "images")
        self._png(root / "labels" / "1.png", np.where(self.labels < 0, 255, self.labels))
        (root / "classes.txt").write_text("".join(f"{name}\n" for name in self.names))

    def word_masks(self, root: Path) -> None:
        self._photograph(root / "images")
        for label, name in enumerate(self.names):
            if (self.labels == label).any():
                self._png(root / "masks" / "1" / f"{name}.png", (self.labels == label) * 255)
        (root / "classes.txt").write_text("".join(f"{name}\n" for name in self.names))

    def coco_instances(self, root: Path) -> None:
        self._photograph(root / "images")
        objects = [
            {"id": label, "image_id": 1, "category_id": 10 + label, "iscrowd": 0, "segmentation": rle}
            for label, rle in run_lengths(self.labels, len(self.names)).items()
        ]
        self._json(root / "instances_val.json", objects)

    def coco_panoptic(self, root: Path, name: str = "panoptic_val") -> None:
        self._photograph(root / "images")
        present = np.unique(self.labels[self.labels >= 0]).tolist()
        segments = [{"id": 70_003 * (label + 1), "category_id": 10 + label} for label in present]
        self._json(root / f"{name}.json", [{"image_id": 1, "file_name": "1.png", "segments_info": segments}])
        ids = 70_003 * (self.labels.astype(np.int64) + 1)
        self._png(root / name / "1.png", np.dstack([ids % 256, ids // 256 % 256, ids // 65_536]))

    def huggingface(self, root: Path, image: str = "image", mask: str = "annotation") -> None:
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        self._png(root / "mask.png", np.where(self.labels < 0, 255, self.labels))
        content = (root / "mask.png").read_bytes()
        columns = {image: self.image, mask: content, "thumbnail": self.image}
        table = {name: [{"bytes": content, "path": None}] for name, content in columns.items()}
        if image == "image":
            del table["thumbnail"]
        parquet.write_table(pyarrow.table(table), root / "val.parquet")
        (root / "id2label.json").write_text(json.dumps({str(place): name for place, name in enumerate(self.names)}))

    def labelme(self, root: Path) -> None:
        self._photograph(root)
        shapes = []
        for label, name in enumerate(self.names):
            if (mask := self.labels == label).any():
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                box = [[int(columns[0]), int(rows[0])], [int(columns[-1]), int(rows[-1])]]
                part = io.BytesIO()
                Image.fromarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]).save(part, "PNG")
                stored = base64.b64encode(part.getvalue()).decode()
                shapes.append({"label": name, "points": box, "shape_type": "mask", "mask": stored})
        height, width = self.labels.shape
        size = {"imageHeight": height, "imageWidth": width}
        (root / "1.json").write_text(json.dumps({"shapes": shapes, "imagePath": "1.jpg", **size}))
        (root / "labels.txt").write_text("\n".join(["__ignore__", "_background_", *self.names]))

    def _photograph(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "1.jpg").write_bytes(self.image)

    def _png(self, path: Path, values: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.astype(np.uint8)).save(path)

    def _json(self, path: Path, annotations: list) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = self.labels.shape
        categories = [{"id": 10 + label, "name": name} for label, name in enumerate(self.names)]
        image = {"id": 1, "file_name": "1.jpg", "width": width, "height": height}
        path.write_text(json.dumps({"images": [image], "annotations": annotations, "categories": categories}))


FORMS = ["folder", "word-masks", "coco-instances", "coco-panoptic", "huggingface", "labelme"]
POLYGONS = {"yolo-seg"}
"""What has corners only can't give any map again."""


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_labels(tmp_path, form):
    if not (SHARED / "camvid").exists():
        pytest.skip(f"needs {SHARED / 'camvid'}")
    data = SegmentationFolder(SHARED / "camvid", "test")
    assert set(FORMS) | POLYGONS == {
        name for name, reader in READERS.items() if not reader.classes
    }  # the others are benchmarks
    for index in (0, 70):
        labels = data[index][1]
        image = (SHARED / "camvid" / "images" / f"{data.name(index)}.jpg").read_bytes()
        root = tmp_path / f"raw{index}"
        root.mkdir()
        getattr(OneMap(image, labels, data.vocabulary.names), form.replace("-", "_"))(root)
        manifest = prepare(READERS[form].open(root), form, tmp_path / f"out{index}")
        assert (manifest.photographs, manifest.left_out) == (1, {})
        prepared = SegmentationFolder(tmp_path / f"out{index}", next(iter(manifest.splits)))
        assert prepared.vocabulary.names == data.vocabulary.names
        assert np.array_equal(prepared[0][1], labels) and np.array_equal(prepared[0][0], data[index][0])
