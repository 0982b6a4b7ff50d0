"""What the reader of a page is supposed to have: small stand-ins, in one folder, under the names that the page uses."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tasks
from opensan.checkpoints import clip_weights, hub, random_model, save_folder
from opensan.checkpoints.official import to_official
from opensan.checkpoints.presets import PRESETS
from opensan.data.prepare import READERS
from opensan.data.prepare.engine import prepare
from opensan.model import SAN

from .documentation import ROOT
from .test_objects import coco_folder
from .test_prepare_benchmarks import full_ade_folder, label_mat, label_png, text
from .test_prepare_own_forms import OneMap

LABELS = np.arange(48 * 64).reshape(48, 64) % 5 // 2 - 1
"""[48, 64] of -1, 0, 1."""


def photograph(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 20).convert("RGB").save(path)


def image_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 20).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def one_map(names: list[str] | None = None) -> OneMap:
    return OneMap(image_bytes(), LABELS, names or ["road", "sky"])


def lay_out(page: str, desk: Path, model: SAN, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `desk` the current folder, with what `page` needs; `model` stands in for the official weights."""
    for name in (
        "street.jpg",
        "a.jpg",
        "b.jpg",
        "photo.jpg",
        "photos/one.jpg",
        "photos/deep/two.png",
        "more/street.jpg",
    ):
        photograph(desk / name)
    for name in ("tests", "src"):
        (desk / name).symlink_to(ROOT / name)
    instead_of_official_weights(desk / "san_vit_b_16.pth", model, monkeypatch)
    for add in MORE.get(page, ()):
        add(desk, monkeypatch)
    monkeypatch.chdir(desk)


def instead_of_official_weights(file: Path, model: SAN, monkeypatch: pytest.MonkeyPatch) -> None:
    """The presets are `model`'s architecture for now, and their file on the hub is `file`, with its weights."""
    for name in ("san-vit-b16", "san-vit-l14"):
        config = model.config.model_copy(update={"name": name})
        monkeypatch.setitem(PRESETS, name, replace(PRESETS[name], config=config))
    torch.save({"model": to_official(model.state_dict(), model.config)}, file)
    download = hub.download
    monkeypatch.setattr(
        hub,
        "download",
        lambda model, repository, *more: (
            file if repository == hub.OFFICIAL_REPOSITORY else download(model, repository, *more)
        ),
    )
    monkeypatch.setattr(clip_weights, "download", lambda *_: pytest.fail("CLIP's weights are not here"))


def street_photographs(desk: Path, _: object) -> None:
    one_map().folder(desk / "street-photographs")
    for split in ("train", "val"):
        (desk / "street-photographs" / f"{split}.txt").write_text("1\n")


def prepared_sets(desk: Path, _: object) -> None:
    street_photographs(desk, _)
    for name in ("street", "rooms"):
        prepare(READERS["folder"].open(desk / "street-photographs"), "folder", desk / "prepared" / name)


def objects(desk: Path, _: object) -> None:
    """A set that knows its objects."""
    coco_folder(desk / "coco")
    prepare(READERS["coco-instances"].open(desk / "coco"), "coco-instances", desk / "prepared" / "objects")


def benchmarks(desk: Path, _: object) -> None:
    """Small downloads of all six."""
    root, row = desk / "downloads", [[1, 2, 3], [0, 5, 6]]

    def tiny_photograph(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2), (200, 100, 50)).save(path)

    tiny_photograph(root / "coco" / "val2017" / "a.jpg")
    label_png(root / "coco" / "stuffthingmaps" / "val2017" / "a.png", row)
    for year in ("2010", "2012"):
        tiny_photograph(root / "VOCdevkit" / f"VOC{year}" / "JPEGImages" / "2008_000002.jpg")
    label_png(root / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "2008_000002.png", row, palette=True)
    text(root / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt", "2008_000002")
    label_mat(root / "VOCdevkit" / "VOC2010" / "trainval" / "2008_000002.mat", row)
    text(root / "VOCdevkit" / "VOC2010" / "val.txt", "2008_000002")
    tiny_photograph(root / "ADEChallengeData2016" / "images" / "validation" / "a.jpg")
    label_png(root / "ADEChallengeData2016" / "annotations" / "validation" / "a.png", row)
    full_ade_folder(root / "ADE20K_2021_17_01", {"ADE_val_00000001": np.array(row)})


def own_forms(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One map of labels in each form; what is downloaded has other column names."""
    given = one_map(["background", "car"])
    for write, name in ((given.folder, "streets"), (given.word_masks, "parts"), (given.coco_instances, "shop")):
        write(desk / name)
    given.coco_panoptic(desk / "scenes", "labels/mine")
    given.labelme(desk / "desk")
    given.folder(desk / "traffic")
    text(desk / "traffic" / "labels" / "1.txt", "1 0 0 1 0 1 1 0 1")
    (desk / "traffic" / "labels" / "1.png").unlink()
    (desk / "saved").mkdir()
    (desk / "download").mkdir()
    one_map(["unlabeled", "car"]).huggingface(desk / "saved")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda repo, local_dir, **_: given.huggingface(local_dir, image="photo", mask="label"),
    )


def scenes(desk: Path, _: object) -> None:
    (desk / "photos" / "scenes").mkdir(parents=True)
    with Image.open(ROOT / "src" / "opensan" / "assets" / "scenes" / "court.png") as scene:
        scene.resize((160, 120)).save(desk / "photos" / "scenes" / "court.png")


def rasters(desk: Path, _: object) -> None:
    rasterio = pytest.importorskip("rasterio")
    values = np.random.default_rng(3).integers(0, 256, (4, 120, 150))
    for name, count, dtype in (("orthophoto", 3, np.uint8), ("satellite", 4, np.uint16)):
        place = {"crs": "EPSG:32632", "transform": rasterio.transform.from_origin(500_000, 5_400_000, 0.5, 0.5)}
        size = {"width": 150, "height": 120, "count": count, "dtype": dtype}
        with rasterio.open(desk / f"{name}.tif", "w", driver="GTiff", **size, **place) as file:
            file.write(values[:count].astype(dtype))


def clips(desk: Path, _: object) -> None:
    pytest.importorskip("av", reason="videos need PyAV (the extra `video`)")
    from .test_video import write_clip

    write_clip(desk / "street.mp4", sound="aac")


def a_hub(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An account `lab` on a hub, and a model to put there."""
    from .hubs import hub_of_this_process

    hub_of_this_process(desk / ".hub", monkeypatch)
    save_folder(random_model("tiny", 0), desk / "runs" / "street" / "model")


def a_cache_of_datasets(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="the library `datasets` is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", desk / ".cache")


def tasks_desk(desk: Path, _: object) -> None:
    pytest.importorskip("av", reason="videos need PyAV (the extra `video`)")
    tasks.lay_out(desk)


MORE: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], None], ...]] = {
    "docs/data.md": (benchmarks,),
    "docs/own-data.md": (own_forms,),
    "docs/training.md": (prepared_sets,),
    "docs/evaluation.md": (prepared_sets,),
    "docs/confidence.md": (prepared_sets,),
    "docs/folders.md": (scenes,),
    "docs/panoptic.md": (objects,),
    "docs/huge-images.md": (rasters,),
    "docs/video.md": (clips,),
    "docs/tasks.md": (tasks_desk,),
    "docs/other-tools.md": (a_hub, a_cache_of_datasets),
}
