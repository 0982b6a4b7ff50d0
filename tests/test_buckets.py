"""Images in buckets: stores that fsspec reads, of which one fails in all ways, and a server of S3."""

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import opensan
from opensan.buckets import BucketPath, bucket_path
from opensan.errors import UserError
from opensan.images import ImageError, list_images, open_image
from opensan.jobs.folder import plan
from opensan.jobs.ledger import Stamp
from opensan.jobs.runs import read_list

from .test_folders import contents, photographs, records

WORDS = "road, car|automobile, sky"


@pytest.fixture
def bucket(tmp_path):
    """memory://photos with seven images of two folders, the same ones as in the folder that is returned."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    folder = photographs(tmp_path / "in", 7)
    (folder / "bad.png").write_text("no image")
    store.put(f"{folder}/", "/photos", recursive=True)
    yield folder
    store.store.clear()


def test_paths_keep_what_paths_have():
    path = bucket_path("s3://bucket/deep/er/street.jpg")
    assert path == bucket_path(Path("s3://bucket/deep/er/street.jpg")) == bucket_path(path)
    assert (str(path), path.name, path.stem, path.suffix) == (
        "s3://bucket/deep/er/street.jpg",
        "street.jpg",
        "street",
        ".jpg",
    )
    assert str(path.parent) == os.fspath(path.parent) == "s3://bucket/deep/er" and type(path.parent) is BucketPath
    assert str(path.parent / "a b#1.png") == "s3://bucket/deep/er/a b#1.png"
    assert pickle.loads(pickle.dumps(path)) == path and path.is_relative_to(bucket_path("s3://bucket"))
    assert bucket_path("file:///a/b.png") == Path("/a/b.png") and type(bucket_path("file:///a/b")) is type(Path())
    for other in ("a.png", "/s3/a.png", "http://a/b.png", "s3", "C:/a.png", "data:image/png;base64,AA"):
        assert bucket_path(other) is None


def test_a_folder_here_that_is_called_so_is_no_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s3:").mkdir()
    Path("s3:/a.png").touch()
    assert bucket_path(Path("s3:/a.png")) is None


def test_a_folder_in_a_bucket_is_labelled_as_one_here(bucket, model_folder, run, tmp_path):
    more = ("-w", WORDS, "-m", model_folder, "--format", "png,json,yolo", "--json", "--device", "cpu")
    code, _, err = run("segment", bucket, *more, "-o", tmp_path / "one")
    assert code == 1 and "bad.png: not an image" in err
    code, again, err = run("segment", "memory://photos", *more, "-o", tmp_path / "out")
    assert code == 1 and "memory://photos/bad.png: not an image" in err and err.count("\n") == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    images = {json.loads(line)["image"] for line in again.splitlines()}
    assert len(images) == 7 and min(images).startswith("memory://photos/0/")
    assert {record["image"] for record in records(tmp_path / "out")} == images
    code, again, err = run("segment", "memory://photos", *more, "-o", tmp_path / "out")
    assert again == "" and code == 1
    fsspec.filesystem("memory").pipe("/photos/1/001.png", (bucket / "0" / "000.png").read_bytes())
    code, again, err = run("segment", "memory://photos", *more, "-o", tmp_path / "out")
    assert [json.loads(line)["image"] for line in again.splitlines()] == ["memory://photos/1/001.png"], err


def test_an_index_of_a_bucket_is_that_of_a_folder(bucket, model_folder, tmp_path):
    pytest.importorskip("lancedb", reason="indexes need lancedb")
    index = opensan.Index(tmp_path / "index", model_folder)
    added = index.add("memory://photos")
    assert (added.new, len(added.broken)) == (7, 1) and index.add("memory://photos").unchanged == 7
    assert index.paths()[0].startswith("memory://photos/0/")
    fsspec.filesystem("memory").rm("/photos/0", recursive=True)
    assert index.remove(missing=True) == 3
    assert len(index.paths()) == 4 and all(
        path[:17] in ("memory://photos/1", "memory://photos/2") for path in index.paths()
    )
    (match, *_) = index.search("sky")
    assert match.path in index.paths()


@pytest.mark.parametrize("column", ["path", "image"])
def test_lists_name_images_in_buckets(bucket, tmp_path, column):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = ["memory://photos/0/000.png", str(bucket / "bad.png"), "memory://photos/0/000.png", "s3://other/a.jpg"]
    parquet.write_table(pyarrow.table({column: names}), tmp_path / "list.parquet")
    (tmp_path / "list.txt").write_text("\n".join(names))
    for file in ("list.parquet", "list.txt"):
        paths = read_list(tmp_path / file)
        assert [str(path) for path in paths] == [names[0], names[1], names[3]]
        assert isinstance(paths[0], BucketPath) and not isinstance(paths[1], BucketPath)
    with pytest.raises(UserError, match="have no folder in common"):
        plan(paths, paths)
    jobs = plan([paths[0], paths[2]], [paths[0], paths[2]])  # asks no bucket
    assert [job.stem for job in jobs] == ["memory:/photos/0/000", "s3:/other/a"]


def test_what_is_missing_or_refused_is_one_line(bucket, model_folder, run, tmp_path, monkeypatch):
    for path, said in (
        ("memory://photos/none.png", "memory://photos/none.png: does not exist"),
        ("http://photos/a.png", "URLs are not fetched"),
    ):
        with pytest.raises(ImageError, match=said):
            list_images([path])
    whole = MemoryFileSystem.cat_file

    def refuse(self, path, **options):
        if path.endswith("000.png"):
            raise PermissionError(path)
        if path.endswith("002.png"):
            raise RuntimeError("Could not connect to the endpoint URL")  # not an OSError, as of botocore
        if path.endswith("004.png"):
            raise FileNotFoundError(path)
        return whole(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", refuse)
    more = ("-w", WORDS, "-m", model_folder, "--format", "png", "--device", "cpu", "-o", tmp_path / "out")
    code, _, err = run("segment", "memory://photos", *more)
    assert code == 1 and "4 of 8 images done" in _
    errors = sorted(line for line in err.splitlines() if line.startswith("error"))
    assert len(errors) == 4 and "(permission denied)" in err and "(there is no such file or bucket)" in err
    assert "002.png: can't be read (Could not connect to the endpoint URL)" in err and "Traceback" not in err
    monkeypatch.setattr(MemoryFileSystem, "isdir", lambda *_: 1 / 0)
    code, _, err = run("segment", "memory://photos", *more)
    assert code == 1 and err.count("\n") == 1 and "memory://photos: can't be reached (division by zero)" in err


def test_without_the_package_of_a_store_one_line_says_what_to_install(monkeypatch):
    def missing(name: str, **_: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    for scheme in ("s3", "gs"):
        with pytest.raises(UserError, match=rf"pip install '.\[{scheme}\]'"):
            list_images([f"{scheme}://bucket/a.png"])


def test_another_version_in_a_bucket_has_another_stamp(bucket):
    path = bucket_path("memory://photos/0/000.png")
    stamp = Stamp.of(path)
    assert stamp.still_holds(path) and stamp.size == (bucket / "0" / "000.png").stat().st_size
    content = path.read_bytes()
    time.sleep(0.01)
    fsspec.filesystem("memory").pipe("/photos/0/000.png", content)
    assert not stamp.still_holds(path)
    assert open_image("memory://photos/0/000.png").shape == open_image(bucket / "0" / "000.png").shape
    with pytest.raises(OSError, match="nothing is written"):
        path.open("wb")


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("s3fs") is None or find_spec("moto") is None or find_spec("flask") is None,
    reason="a server of S3 needs s3fs (the extra `s3`) and moto[server]",
)
def test_a_server_of_s3(bucket, model_folder, run, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)])
    more = ("-w", WORDS, "-m", model_folder, "--format", "png", "--device", "cpu")
    try:
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < end and server.poll() is None
                time.sleep(0.1)
        store = fsspec.filesystem("s3", skip_instance_cache=True)
        store.mkdir("photos")
        store.put(f"{bucket}/", "photos/deep", recursive=True)
        fsspec.filesystem("s3").invalidate_cache()
        run("segment", bucket, *more, "-o", tmp_path / "one")
        code, out, err = run("segment", "s3://photos/deep", *more, "-o", tmp_path / "out")
        assert code == 1 and "s3://photos/deep/bad.png: not an image" in err and err.count("\n") == 1, err
        assert contents(tmp_path / "out") == contents(tmp_path / "one")
        code, out, err = run("segment", "s3://photos/deep", *more, "-o", tmp_path / "out")
        assert "7 of 8 images done, 7 of them earlier" in out
        code, out, err = run("segment", "s3://nowhere/deep", *more, "-o", tmp_path / "other")
        assert code == 1 and err.count("\n") == 1 and "s3://nowhere/deep: does not exist" in err
    finally:
        server.kill()
        server.wait()
    fsspec.filesystem("s3").invalidate_cache()
    code, out, err = run("segment", "s3://photos/deep", *more, "-o", tmp_path / "other")
    assert code == 1 and err.count("\n") == 1 and "s3://photos/deep: can't be reached" in err, err
