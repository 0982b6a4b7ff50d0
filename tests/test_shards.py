"""Data sets in shards: the same images and the same training as from a folder, whatever is damaged or stopped."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from opensan.buckets import bucket_path
from opensan.data import shards as shards_module
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.data.shards import ShardedSet, adopt_shards, index_shard, write_shards
from opensan.errors import UserError

from .test_recipe import recipe_file, rows, squares  # noqa: F401 (fixtures)
from .test_recipe import run as run_command

SMALL = 12_000
"""Bytes of a shard that holds few of the squares."""


def written(squares: Path, out: Path, split: str = "train", size: int = SMALL):  # noqa: F811
    made, left_out = write_shards(squares, split, out, most_bytes=size)
    assert not left_out
    return made


def test_shards_hold_what_the_folder_holds(squares, tmp_path):  # noqa: F811
    """Images, labels, names and sizes, also of images whose names have dots, and whose format is that of labels."""
    (squares / "images" / "photo0.png").rename(squares / "images" / "photo.0.png")
    (squares / "labels" / "photo0.png").rename(squares / "labels" / "photo.0.png")
    (squares / "train.txt").write_text((squares / "train.txt").read_text().replace("photo0", "photo.0"))
    (squares / "objects").mkdir()
    for label in (squares / "labels").iterdir():
        objects = (np.asarray(Image.open(label)) == 1).astype(np.uint16) * 7
        Image.fromarray(objects).save(squares / "objects" / label.name)
    made = written(squares, tmp_path / "shards")
    assert len(made) > 2 and all(shard.size <= SMALL + tarfile.RECORDSIZE for shard in made)
    folder, own = SegmentationFolder(squares, "train"), ShardedSet(tmp_path / "shards", "train")
    assert len(own) == len(folder) == 8 and own.vocabulary == folder.vocabulary and own.knows_objects
    for index in range(8):
        assert (own.name(index), own.size(index)) == (folder.name(index), folder.size(index))
        assert all(np.array_equal(a, b) for a, b in zip(own[index], folder[index], strict=True))
        assert np.array_equal(own.objects(index), folder.objects(index))
    assert max(own.objects(index).max() for index in range(8)) == 7
    assert ShardedSet(tmp_path / "shards", "train", ignored=["red"]).vocabulary.names == folder.vocabulary.names[1:]
    with tarfile.open(tmp_path / "shards" / made[0].name) as tar:  # as other programs read it
        names = [member.name for member in tar]
        assert names[:4] == ["000000.png", "000000.labels.png", "000000.objects.png", "000000.json"]
        assert json.load(tar.extractfile("000000.json")) == {"name": "photo.0"}
    with pytest.raises(IndexError):
        own[8]


def test_a_training_from_shards_in_a_bucket_is_that_from_the_folder(tmp_path, recipe_file, squares, capsys):  # noqa: F811
    """To the last digit, with workers."""
    assert run_command("train", recipe_file) == 0
    for split in ("train", "val"):
        written(squares, tmp_path / "shards", split)
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.put(f"{tmp_path / 'shards'}/", "/squares", recursive=True)
    shutil.rmtree(squares)
    more = ("data.0.folder=memory://squares", "validation.folder=memory://squares", "loop.workers=2")
    own = rows(tmp_path / "run" / "log.csv")
    losses = [index for index, name in enumerate(own[0]) if "loss" in name]
    assert losses

    def figures(table: list[list[str]]) -> list[list[str]]:
        return [[row[index] for index in losses] for row in table]

    whole = f"out={tmp_path / 'whole'}"
    assert run_command("train", recipe_file, *more, whole) == 0
    assert figures(rows(tmp_path / "whole" / "log.csv")) == figures(own)
    assert rows(tmp_path / "whole" / "validation.csv") == rows(tmp_path / "run" / "validation.csv")
    record = json.loads((tmp_path / "whole" / "model" / "training.json").read_text())
    assert record["data"][0]["name"] == "squares" and record["data"][0]["images"] == 8
    store.store.clear()
    capsys.readouterr()
    assert run_command("train", recipe_file, *more, whole) == 1
    told = capsys.readouterr().err
    assert "memory://squares: has no train.shards.json" in told and told.count("\n") == 1


def test_damage_is_told_in_one_line(squares, tmp_path):  # noqa: F811
    made = written(squares, tmp_path / "shards")
    shard = tmp_path / "shards" / made[1].name
    whole = shard.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match) as caught:
            ShardedSet(tmp_path / "shards", "train")
        assert "\n" not in str(caught.value)

    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 1
    shard.write_bytes(middle)
    data = ShardedSet(tmp_path / "shards", "train")
    broken = []
    for index in range(len(data)):
        try:
            data[index]
        except UserError as error:
            broken.append(str(error))
    assert len(broken) == 1 and "train-00001.tar: damaged at photo" in broken[0]
    shard.write_bytes(whole[:-600])
    refused(r"train-00001\.tar: has [\d,]+ bytes, not [\d,]+: it was changed or not copied whole")
    shard.unlink()
    refused("can't be read")
    shard.write_bytes(whole)
    index = Path(f"{shard}.json")
    text = index.read_text()
    for content, said in (
        ("{", "damaged"),
        ('{"format": 99, "samples": []}', "newer version"),
        (text.replace("[[", "[[0,"), "damaged"),
        (json.dumps({"format": 1, "samples": json.loads(text)["samples"][:1]}), "does not fit"),
        (json.dumps({"format": 1, "samples": [["a", 0, 1 << 60, 0, [0, 1], [0, 1], None, 1, 1]]}), "outside"),
    ):
        index.write_text(content)
        refused(said)
    index.write_text(text)
    names = tmp_path / "shards" / "train.shards.json"
    names.write_text(names.read_text().replace("train-00000.tar", "../train-00000.tar"))
    refused("not in its folder")


def test_a_stopped_writing_goes_on_and_a_changed_image_is_written_anew(squares, tmp_path, monkeypatch):  # noqa: F811
    through, calls = shards_module._write_tar, []

    def dying(path: Path, group: list) -> None:
        calls.append(path.name)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        through(path, group)

    monkeypatch.setattr(shards_module, "_write_tar", dying)
    with pytest.raises(KeyboardInterrupt):
        written(squares, tmp_path / "shards")
    assert not list((tmp_path / "shards").glob("*.part*")) and not (tmp_path / "shards" / "train.shards.json").exists()
    made = written(squares, tmp_path / "shards")
    assert len(calls) == 3 + len(made) - 2
    Image.new("RGB", (96, 72)).save(squares / "images" / "photo0.png")
    written(squares, tmp_path / "shards")
    assert len(calls) == 3 + len(made) - 2 + 1
    assert not ShardedSet(tmp_path / "shards", "train")[0][0].any()
    assert len(written(squares, tmp_path / "shards", size=1 << 30)) == 1
    assert [path.name for path in sorted((tmp_path / "shards").glob("*.tar"))] == ["train-00000.tar"]
    (squares / "classes.txt").write_text("red\nblue\ngreen\n")
    with pytest.raises(UserError, match="shards of other classes"):
        written(squares, tmp_path / "shards")


def test_the_command_names_what_it_leaves_out(squares, tmp_path, run):  # noqa: F811
    (squares / "images" / "photo1.png").write_text("no image")
    (squares / "labels" / "photo2.png").unlink()
    code, out, err = run("data", "shards", squares, "--out", tmp_path / "shards", "--size", 1)
    assert code == 1 and "train                6 images in 1 shards" in out and "val                  4 images" in out
    assert "photo1 is left out: not an image" in err and "photo2.png is left out" in err and err.count("\n") == 2
    assert len(ShardedSet(tmp_path / "shards", "train")) == 6
    again = run("data", "shards", squares, "--out", tmp_path / "shards", "--size", 1)
    assert again == (code, out, err)
    code, _, err = run("data", "shards", tmp_path / "nowhere", "--out", tmp_path / "shards")
    assert code == 1 and err.count("\n") == 1


def test_shards_of_another_program_are_listed(squares, tmp_path, run):  # noqa: F811
    """With other names for labels, folders in names, samples that lack something, and files of other kinds."""
    folder = tmp_path / "web"
    folder.mkdir()
    shutil.copy(squares / "classes.txt", folder)
    image = (squares / "images" / "photo0.png").read_bytes()
    labels = (squares / "labels" / "photo0.png").read_bytes()
    jpeg = io.BytesIO()
    Image.open(io.BytesIO(image)).save(jpeg, "JPEG")
    members = [
        ("./a/one.jpg", jpeg.getvalue()),
        ("./a/one.png", labels),
        ("./a/one.txt", b"a caption"),
        ("two.png", image),
        ("two.seg.png", labels),
        ("three.png", image),
        ("four.pkl", b"cos\nsystem\n(S'true'\ntR."),  # never opened
        ("four.seg.png", labels),
        ("four.webp", b"no image"),
    ]
    with tarfile.open(folder / "train-7.tar", "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    code, out, err = run("data", "shards", folder)
    assert code == 1 and "2 images in 1 shards" in out
    assert "three is left out: needs one image" in err and "four is left out: not an image" in err
    data = ShardedSet(folder, "train")
    assert [data.name(index) for index in range(2)] == ["./a/one", "two"]
    assert all(np.array_equal(data[index][1], SegmentationFolder(squares, "train")[0][1]) for index in range(2))
    (folder / "train-8.tar").write_bytes((folder / "train-7.tar").read_bytes()[:7000])
    with pytest.raises(UserError, match=r"train-8\.tar: .*damaged"):
        adopt_shards(folder, "train", list(folder.glob("*.tar")))
    with tarfile.open(folder / "train-8.tar", "w:gz"):
        pass
    with pytest.raises(UserError, match="not an uncompressed tar file"):
        index_shard(folder / "train-8.tar")


def test_a_bucket_that_can_not_be_reached_is_one_line(monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    from opensan.recipe.config import DataConfig
    from opensan.recipe.run import open_data

    monkeypatch.setattr(MemoryFileSystem, "exists", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=r"memory://squares: can't be reached \(division by zero\)"):
        open_data(DataConfig(folder=Path("memory://squares")))
    assert bucket_path(Path("memory://squares")) is not None
