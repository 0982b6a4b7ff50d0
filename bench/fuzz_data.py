"""Feed `opensan data prepare` damaged sets: whatever is in them, it ends in a folder or in one line.

python bench/fuzz_data.py --rounds 2000
"""

import argparse
import base64
import collections
import io
import json
import random
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from opensan.data.check import FolderCheck
from opensan.data.prepare import READERS
from opensan.data.prepare.engine import prepare
from opensan.errors import UserError

VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2**70,
    1e308,
    float("nan"),
    "",
    "x",
    "../x",
    "a\0b",
    "\ud800",
    [],
    {},
    [[]],
    [1],
    {"a": 1},
]
"""What a damaged JSON file may hold anywhere."""


def png(values: np.ndarray, **save: Any) -> bytes:
    content = io.BytesIO()
    Image.fromarray(values).save(content, "PNG", **save)
    return content.getvalue()


def write(root: Path, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


SIZE = (6, 9)
IMAGE = png(np.full((*SIZE, 3), 90, np.uint8))
MAP = np.arange(54, dtype=np.uint8).reshape(SIZE) % 3
NAMES = "road\ncar|automobile\nsky\n"
POLYGON = [[1.0, 1.0, 6.0, 1.0, 6.0, 4.0]]


def folder(root: Path) -> None:
    write(root, {f"images/{name}.png": IMAGE for name in "ab"} | {f"labels/{name}.png": png(MAP) for name in "ab"})
    write(root, {"classes.txt": NAMES, "train.txt": "images/a.png labels/a.png\n", "val.txt": "b\n"})
    write(root, {"colours.txt": "0 0 0 road\n1 1 1 car\n2 2 2 sky\n"} if random.random() < 0.5 else {})


def word_masks(root: Path) -> None:
    masks = {f"masks/{name}/{word}.png": png((MAP == 1) * np.uint8(255)) for name in "ab" for word in ("car", "sky")}
    write(root, {f"images/{name}.png": IMAGE for name in "ab"} | masks | {"classes.txt": NAMES})


def coco(root: Path, kind: str, annotations: list) -> None:
    sizes = {"width": SIZE[1], "height": SIZE[0]}
    images = [{"id": number, "file_name": f"{name}.png", **sizes} for number, name in enumerate("ab")]
    categories = [{"id": number, "name": name, "supercategory": "x"} for number, name in enumerate(("car", "sky"))]
    data = {"images": images, "annotations": annotations, "categories": categories}
    write(root, {f"images/{name}.png": IMAGE for name in "ab"} | {f"{kind}_val.json": json.dumps(data)})


def instances(root: Path) -> None:
    run_lengths = {"size": list(SIZE), "counts": [3, 4, 47]}
    coco(
        root,
        "instances",
        [
            {
                "id": number,
                "image_id": number % 2,
                "category_id": number % 2,
                "iscrowd": number % 3,
                "bbox": [0, 0, 2, 2],
            }
            | {"segmentation": POLYGON if number % 2 else run_lengths}
            for number in range(5)
        ],
    )


def panoptic(root: Path) -> None:
    write(root, {f"panoptic_val/{name}.png": png(np.dstack([MAP, MAP * 0, MAP * 0])) for name in "ab"})
    segments = [{"id": number, "category_id": number % 2, "iscrowd": 0} for number in (1, 2)]
    coco(
        root,
        "panoptic",
        [
            {"image_id": number, "file_name": f"{name}.png", "segments_info": segments}
            for number, name in enumerate("ab")
        ],
    )


def yolo(root: Path) -> None:
    write(root, {f"images/{name}.png": IMAGE for name in "ab"} | {"data.yaml": "names: {0: car, 1: sky}\n"})
    write(root, {f"labels/{name}.txt": "0 0.1 0.1 0.9 0.1 0.9 0.9\n1 0 0 1 0 1 1\n" for name in "ab"})


def labelme(root: Path) -> None:
    mask = base64.b64encode(png(np.ones((2, 2), bool))).decode()
    shapes = [
        {"label": "car", "points": [[1, 1], [6, 1], [6, 4]], "shape_type": "polygon"},
        {"label": "sky", "points": [[1, 1], [6, 4]], "shape_type": "rectangle"},
        {"label": "sun", "points": [[3, 3], [4, 4]], "shape_type": "circle"},
        {"label": "sun", "points": [[3, 3], [4, 4]], "shape_type": "mask", "mask": mask},
    ]
    data = {
        "shapes": shapes,
        "imageHeight": SIZE[0],
        "imageWidth": SIZE[1],
        "imageData": base64.b64encode(IMAGE).decode(),
    }
    write(root, {f"{name}.json": json.dumps({**data, "imagePath": f"{name}.png"}) for name in "ab"} | {"a.png": IMAGE})


def huggingface(root: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    root.mkdir(parents=True, exist_ok=True)
    columns = {"image": IMAGE, "label": png(MAP)}
    parquet.write_table(
        pyarrow.table({name: [{"bytes": content, "path": None}] * 2 for name, content in columns.items()}),
        root / "val.parquet",
    )
    write(root, {"id2label.json": '{"0": "road", "1": "car", "2": "sky"}'})


def ade(root: Path) -> None:
    write(root, {f"images/validation/{name}.jpg": IMAGE for name in "ab"})
    write(root, {f"annotations/validation/{name}.png": png(MAP) for name in "ab"})


FORMS: dict[str, Callable[[Path], None]] = {
    "folder": folder,
    "word-masks": word_masks,
    "coco-instances": instances,
    "coco-panoptic": panoptic,
    "yolo-seg": yolo,
    "labelme": labelme,
    "huggingface": huggingface,
    "ade20k_150": ade,
}


def damage(root: Path, rng: random.Random) -> str:
    """Damage one to three files of a set; what was done."""
    done = []
    for _ in range(rng.randint(1, 3)):
        files = sorted(path for path in root.rglob("*") if path.is_file())
        path = rng.choice(files)
        content = path.read_bytes()
        if path.suffix == ".json" and rng.random() < 0.8:
            content = damaged_json(content, rng)
        elif path.suffix == ".png" and rng.random() < 0.4:
            content = other_png(rng)
        else:
            content = damaged_bytes(content, rng)
        path.write_bytes(content)
        done.append(path.name)
    return ", ".join(done)


def damaged_json(content: bytes, rng: random.Random) -> bytes:
    """A JSON file with a value somewhere replaced, taken away or repeated."""
    try:
        data = json.loads(content)
    except ValueError:
        return damaged_bytes(content, rng)
    places = []

    def visit(node: object) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            visit(node[key])

    visit(data)
    if not places:
        return content
    node, key = rng.choice(places)
    if rng.random() < 0.2:
        del node[key]
    elif rng.random() < 0.1 and isinstance(node, list):
        node.append(node[key])
    else:
        node[key] = rng.choice(VALUES)
    return json.dumps(data).encode()


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 8)):
        place = rng.randrange(len(changed) + 1)
        match rng.randrange(4):
            case 0:
                changed[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                del changed[place : place + rng.randint(1, 20)]
            case 2:
                changed[place:place] = rng.choice([b"\n\n", b"# ", b"\0", b"\xff", b"9: x\n", b"-1", b"1e999 ", b"../"])
            case 3:
                changed[place:] = changed[place : place + 1] * rng.randrange(3)
    return bytes(changed)


def other_png(rng: random.Random) -> bytes:
    """A label map of another kind: bits, palettes, channels, sizes, values."""
    size = SIZE if rng.random() < 0.8 else (rng.randint(1, 12), rng.randint(1, 12))
    shape = rng.choice([size, (*size, 2), (*size, 3), (*size, 4)])
    kind = rng.choice([np.uint8, np.uint16, bool]) if len(shape) == 2 else np.uint8
    values = np.random.default_rng(rng.randrange(2**32)).integers(0, rng.choice([2, 4, 256]), shape).astype(kind)
    if len(shape) == 2 and kind is np.uint8 and rng.random() < 0.5:
        image = Image.fromarray(values, "P")
        image.putpalette([rng.randrange(256) if rng.random() < 0.5 else number // 3 for number in range(768)])
        content = io.BytesIO()
        image.save(content, "PNG", bits=rng.choice([8, 8, 4]))
        return content.getvalue()
    return png(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    random.seed(arguments.seed)
    ends: collections.Counter[str] = collections.Counter()
    faults: collections.Counter[str] = collections.Counter()
    slowest = 0.0
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        for number in range(arguments.rounds):
            name = list(FORMS)[number % len(FORMS)]
            raw, out = Path(place, "raw"), Path(place, "out")
            for path in (raw, out):
                shutil.rmtree(path, ignore_errors=True)
            FORMS[name](raw)
            done = damage(raw, rng)
            start = time.monotonic()
            try:
                manifest = prepare(READERS[name].open(raw), name, out)
                check = FolderCheck(out)
                check.look()
                unsaid = set(check.problems) - {
                    line for line in check.problems if "left out" in line or "missing" in line
                }
                ends["with images left out" if manifest.left_out else "whole"] += 1
                if unsaid:
                    faults[f"check of what was just prepared: {next(iter(unsaid))[:100]}"] += 1
            except UserError as error:
                ends["one line"] += 1
                if "\n" in str(error):
                    faults["more than one line"] += 1
            except Exception as error:
                ends["traceback"] += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                faults[
                    f"{name} ({done}): {type(error).__name__}: {error} at {Path(where.filename).name}:{where.lineno}"[
                        :200
                    ]
                ] += 1
            slowest = max(slowest, time.monotonic() - start)
    print(", ".join(f"{end}: {count}" for end, count in sorted(ends.items())), f"slowest: {slowest:.1f} s", sep="; ")
    for fault, count in faults.most_common(20):
        print(f"{count} x {fault}")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
