"""Tables of photographs and masks: written here as `datasets` writes them, and by `datasets` itself where it is."""

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opensan.cli import main
from opensan.data.prepare.engine import prepare
from opensan.data.prepare.own_huggingface import open_table
from opensan.data.prepare.source import Source
from opensan.data.segmentation_folder import SegmentationFolder

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

NAMES = {"0": "unlabeled", "1": "flat-road", "34": "sky"}
MASK = [[0, 1, 34], [255, 1, 0]]
LABELS = [[0, 1, 2], [-1, 1, 0]]


def encoded(values, kind: str = "PNG", dtype=np.uint8, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.array(values, dtype)).save(buffer, kind, **options)
    return buffer.getvalue()


PHOTOGRAPH = encoded(np.full((2, 3, 3), 120), "JPEG")


def rows(count: int, mask: bytes = encoded(MASK)) -> dict[str, list]:
    return {
        "pixel_values": [{"bytes": PHOTOGRAPH, "path": f"{number}.jpg"} for number in range(count)],
        "label": [{"bytes": mask, "path": None}] * count,
        "scene": [0] * count,
    }


def as_table(columns: dict[str, list]):
    features = {name: {"_type": "Image"} for name in columns if name != "scene"}
    features["scene"] = {"names": ["in", "out"], "_type": "ClassLabel"}
    note = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    table = pyarrow.table(columns)
    return table.replace_schema_metadata(note)


def write_parquet(path: Path, columns: dict[str, list], **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(as_table(columns), path, **options)


@pytest.fixture
def folder(tmp_path):
    """As a repository on the hub: three photographs to train on in two files, one of which has two row groups."""
    root = tmp_path / "raw"
    write_parquet(root / "data" / "train-00000-of-00002.parquet", rows(2), row_group_size=1)
    write_parquet(root / "data" / "train-00001-of-00002-6ce6f7c4b2a19eb2.parquet", rows(1))
    write_parquet(root / "data" / "test-00000-of-00001.parquet", rows(1, encoded([[34] * 3] * 2)))
    write_parquet(root / ".cache" / "old.parquet", rows(1))
    (root / "id2label.json").write_text(json.dumps(NAMES))
    return root


def labels_of(source: Source) -> dict[str, list]:
    return {one.name: pickle.loads(pickle.dumps(one.labels))().tolist() for one in source.images}


def test_parquet(folder, tmp_path):
    source = open_table(folder)
    assert source.vocabulary.names == ["unlabeled", "flat-road", "sky"]
    assert source.evaluation_split == "test"
    assert labels_of(source) == {
        "test_000000": [[2] * 3] * 2,
        "train_000000": LABELS,
        "train_000001": LABELS,
        "train_000002": LABELS,
    }
    manifest = prepare(source, "huggingface", tmp_path / "out")
    assert (manifest.splits, manifest.left_out) == ({"test": 1, "train": 3}, {})
    assert (tmp_path / "out" / "images" / "train_000002.jpg").read_bytes() == PHOTOGRAPH  # not encoded again
    assert SegmentationFolder(tmp_path / "out", "train")[2][1].tolist() == LABELS


def test_parquet_through_the_command(folder, tmp_path, capsys):
    options = ["ignored=unlabeled", "unlabelled=7"]
    with pytest.raises(SystemExit) as caught:
        main(["data", "prepare", "huggingface", *options, "--source", str(folder), "--out", str(tmp_path / "out")])
    assert ((caught.value.code or 0), capsys.readouterr().err) == (0, "")
    data = SegmentationFolder(tmp_path / "out", "train")
    assert data.vocabulary.names == ["flat-road", "sky"]
    assert data[0][1].tolist() == [[-1, 0, 1], [-1, 0, -1]]


@pytest.mark.parametrize("form", ["stream", "file"])
def test_arrow(folder, form):
    """As save_to_disk writes them; a file that `datasets` computed later is none of it."""
    shutil.rmtree(folder / "data")
    for place, count in (("train/data-00000-of-00001", 2), ("validation/data-00000-of-00001", 1), ("train/cache-1", 1)):
        path = folder / f"{place}.arrow"
        path.parent.mkdir(exist_ok=True)
        table = as_table(rows(count))
        make = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
        with make(str(path), table.schema) as writer:
            writer.write_table(table)
    source = open_table(folder)
    assert labels_of(source) == {"train_000000": LABELS, "train_000001": LABELS, "validation_000000": LABELS}
    assert source.evaluation_split == "validation"


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("default/train/0000", "train"),
        ("train", "train"),
        ("0000", "all"),
        ("data-00000-of-00001", "all"),
        ("my-photographs", "my-photographs"),
    ],
)
def test_splits_are_told_by_names(tmp_path, name, split):
    write_parquet(tmp_path / f"{name}.parquet", rows(1))
    (tmp_path / "classes.txt").write_text("".join(f"class {number}\n" for number in range(35)))
    source = open_table(tmp_path)
    assert [one.splits for one in source.images] == [(split,)]
    assert labels_of(source)[f"{split}_000000"] == [[0, 1, 34], [-1, 1, 0]]


def test_columns_that_have_to_be_told(tmp_path):
    columns = rows(1)
    columns["image"] = columns["pixel_values"]
    columns["bare"] = [encoded(MASK)]
    write_parquet(tmp_path / "train.parquet", columns)
    (tmp_path / "names.json").write_text(json.dumps(NAMES))
    with pytest.raises(ValueError, match=r"Say image=COLUMN mask=COLUMN; .* pixel_values, label, image, bare"):
        open_table(tmp_path)
    assert labels_of(open_table(tmp_path, image="image", mask="bare", classes="names.json")) == {"train_000000": LABELS}
    with pytest.raises(ValueError, match=r"mask=lable: .*train.parquet has no such column; it has pixel_values, label"):
        open_table(tmp_path, image="image", mask="lable", classes="names.json")


def test_classes(folder):
    assert open_table(folder, classes="scene").vocabulary.names == ["in", "out"]
    (folder / "id2label.json").write_text('["road", "sky"]')
    assert open_table(folder).vocabulary.names == ["road", "sky"]
    for said in ("{", '{"a": "road"}', '{"0": 1}', "3", '{"-1": "road"}'):
        (folder / "id2label.json").write_text(said)
        with pytest.raises(ValueError, match=r"id2label.json: (not readable JSON|must be pixel values)"):
            open_table(folder)
    (folder / "id2label.json").unlink()
    with pytest.raises(ValueError, match=r"id2label.json: no such file; .*or a column of class labels: scene"):
        open_table(folder)
    with pytest.raises(ValueError, match=r"classes: '../x.json' is no path below the folder"):
        open_table(folder, classes="../x.json")


def test_nested_class_labels(tmp_path):
    table = as_table(rows(1))
    features = {"objects": {"feature": {"category": {"names": ["a", "b"], "_type": "ClassLabel"}}, "_type": "List"}}
    note = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    parquet.write_table(table.replace_schema_metadata(note), tmp_path / "train.parquet")
    assert open_table(tmp_path, classes="objects.category").vocabulary.names == ["a", "b"]


def test_grey_stored_as_rgb_is_read_and_colours_are_not(tmp_path):
    (tmp_path / "id2label.json").write_text(json.dumps(NAMES))
    write_parquet(tmp_path / "train.parquet", rows(1, encoded(np.dstack([MASK] * 3))))
    assert labels_of(open_table(tmp_path)) == {"train_000000": LABELS}
    write_parquet(tmp_path / "train.parquet", rows(1, encoded(np.dstack([MASK, MASK, np.zeros((2, 3))]))))
    with pytest.raises(ValueError, match=r"row 0, column 'label': an RGB picture, not an index map"):
        labels_of(open_table(tmp_path))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"bytes": None, "path": "/etc/passwd"}, r"row group 0, row 0, column 'label': holds only a path; write"),
        (None, r"column 'label': holds nothing"),
        ({"bytes": encoded([[2] * 3] * 2), "path": None}, r"6 pixels hold the value 2; classes are 0-1, 34, 255 is"),
        ({"bytes": encoded([[0] * 2] * 2), "path": None}, r"'label': is 2x2, its image 3x2"),
        ({"bytes": PHOTOGRAPH, "path": None}, r"'label': not a PNG or TIFF or BMP or GIF file"),
    ],
)
def test_rows_that_can_not_be_used_are_named(tmp_path, mask, message):
    columns = rows(2)
    columns["label"][0] = mask
    write_parquet(tmp_path / "raw" / "train.parquet", columns)
    (tmp_path / "raw" / "id2label.json").write_text(json.dumps(NAMES))
    with pytest.raises(ValueError, match=message):
        open_table(tmp_path / "raw").images[0].labels()
    manifest = prepare(open_table(tmp_path / "raw"), "huggingface", tmp_path / "out")
    assert list(manifest.left_out) == ["train_000000"] and manifest.splits == {"train": 1}


def test_files_that_are_no_tables_are_named(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no .parquet or .arrow files; say repo=OWNER/NAME"):
        open_table(tmp_path / "empty")
    write_parquet(folder / "other" / "train.parquet", {"scene": [1]})
    with pytest.raises(ValueError, match=r"train.parquet: its columns are not those of .* give the folder of one"):
        open_table(folder)
    for name in ("train.parquet", "train.arrow"):
        shutil.rmtree(folder / "other")
        (folder / "other").mkdir()
        (folder / "other" / name).write_bytes(b"PAR1 and no more")
        with pytest.raises(ValueError, match=rf"{name}: not a readable table") as caught:
            open_table(folder)
        assert "\n" not in str(caught.value)


def test_download(folder, tmp_path, monkeypatch):
    """A hub that has tables only where it converted a data set itself."""
    asked = []

    def snapshot_download(repo, *, repo_type, revision, local_dir, allow_patterns):
        asked.append((repo, repo_type, revision))
        if revision == "refs/convert/parquet":
            shutil.copytree(folder, local_dir, dirs_exist_ok=True)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "new").mkdir()
    assert len(open_table(tmp_path / "new", repo="owner/streets").images) == 4
    assert asked == [("owner/streets", "dataset", "main"), ("owner/streets", "dataset", "refs/convert/parquet")]


def test_a_hub_that_does_not_answer(tmp_path, monkeypatch, capsys):
    def snapshot_download(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ConnectionError, match=r"repo=owner/streets: the hub did not give it \(no route\)"):
        open_table(tmp_path, repo="owner/streets")
    with pytest.raises(SystemExit):
        main(["data", "prepare", "huggingface", "repo=owner/streets", "--source", str(tmp_path), "--out", "out"])
    assert capsys.readouterr().err.startswith("error: repo=owner/streets: the hub did not give it")


@pytest.mark.parametrize("form", ["save_to_disk", "to_parquet"])
def test_what_datasets_itself_writes(tmp_path, form):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    pictures = {
        "image": [Image.open(io.BytesIO(PHOTOGRAPH))] * 2,
        "annotation": [Image.fromarray(np.uint8(MASK))] * 2,
    }
    data = datasets.DatasetDict({"train": datasets.Dataset.from_dict(pictures, features=features)})
    if form == "save_to_disk":
        data.save_to_disk(tmp_path / "saved")
    else:
        data["train"].to_parquet(tmp_path / "saved" / "train.parquet")
    (tmp_path / "saved" / "id2label.json").write_text(json.dumps(NAMES))
    assert labels_of(open_table(tmp_path / "saved")) == {"train_000000": LABELS, "train_000001": LABELS}
