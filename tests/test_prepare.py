"""The engine that writes data sets in the canonical layout: what it writes, refuses, and survives; and the check."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opensan.data.canonical import read_manifest
from opensan.data.check import FolderCheck
from opensan.data.prepare import Source, SourceImage
from opensan.data.prepare.engine import JOURNAL, LOCK, prepare
from opensan.data.prepare.source import Labelled
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.errors import UserError
from opensan.files import hold
from opensan.journal import Journal
from opensan.vocabulary import Vocabulary


def constant(value: np.ndarray) -> np.ndarray:
    return value


def photo(
    folder: Path, name: str, splits: tuple[str, ...] = ("train",), labels: np.ndarray | None = None
) -> SourceImage:
    """A photograph of 3x2 (width x height) in `folder`, with these labels."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (3, 2), (len(name), 20, 30)).save(folder / f"{name}.png")
    labels = np.array([[0, 1, -1], [2, 2, 0]]) if labels is None else labels
    return SourceImage(name, splits, folder / f"{name}.png", functools.partial(constant, labels))


WORDS = Vocabulary.parse("road, car|automobile, sky")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder, by name; of links also what they lead to."""
    return {
        str(path.relative_to(folder)): path.read_bytes() + (str(path.readlink()).encode() if path.is_symlink() else b"")
        for path in folder.rglob("*")
        if not path.is_dir()
    }


def test_the_canonical_layout(tmp_path):
    photographs = [photo(tmp_path / "raw", "b.1", ("train", "all")), photo(tmp_path / "raw", "a", ("val", "all"))]
    manifest = prepare(Source(WORDS, photographs, evaluation_split="val"), "mine", tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "classes.txt").read_text() == "road\ncar|automobile\nsky\n"
    assert (out / "all.txt").read_text() == "b.1.png\na.png\n"
    assert (out / "images" / "b.1.png").readlink() == tmp_path / "raw" / "b.1.png"
    with Image.open(out / "labels" / "b.1.png") as label:
        assert (label.mode, np.asarray(label).tolist()) == ("L", [[0, 1, 255], [2, 2, 0]])
    assert manifest == read_manifest(out)
    assert (manifest.splits, manifest.photographs) == ({"all": 2, "train": 1, "val": 1}, 2)
    assert (manifest.request.source, manifest.evaluation_split, manifest.left_out) == ("mine", "val", {})
    data = SegmentationFolder(out, "train")
    assert (data.vocabulary, data.name(0), data[0][1].tolist()) == (WORDS, "b.1", [[0, 1, -1], [2, 2, 0]])
    assert sorted(path.name for path in out.iterdir()) == [
        *("all.txt", "classes.txt", "files.jsonl", "images", "labels", "manifest.json", "train.txt", "val.txt")
    ]
    records = [json.loads(line) for line in (out / "files.jsonl").read_text().splitlines()]
    assert [(record["name"], record["width"], record["height"]) for record in records] == [("a", 3, 2), ("b.1", 3, 2)]


def test_more_than_255_classes_need_16_bits(tmp_path):
    for count, mode, unlabelled in ((255, "L", 255), (256, "I;16", 65_535)):
        words = Vocabulary.parse([f"word {number}" for number in range(count)])
        labels = np.array([[0, count - 1, -1], [1, 1, -7]], np.int64)
        out = tmp_path / str(count)
        prepare(Source(words, [photo(tmp_path / "raw", "a", labels=labels)]), "mine", out)
        with Image.open(out / "labels" / "a.png") as label:
            assert label.mode == mode
            assert np.asarray(label).tolist() == [[0, count - 1, unlabelled], [1, 1, unlabelled]]
        assert SegmentationFolder(out, "train")[0][1].tolist() == [[0, count - 1, -1], [1, 1, -1]]


def jpeg_bytes(path: Path) -> bytes:
    return path.read_bytes()


def test_photographs_that_are_no_files_are_written(tmp_path):
    Image.new("RGB", (3, 2), "red").save(tmp_path / "red.jpg")
    labels = functools.partial(constant, np.zeros((2, 3), int))
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    photographs = [
        SourceImage("pixels", ("all",), functools.partial(constant, pixels), labels),
        SourceImage("bytes", ("all",), functools.partial(jpeg_bytes, tmp_path / "red.jpg"), labels),
    ]
    prepare(Source(WORDS, photographs), "mine", tmp_path / "out")
    images = tmp_path / "out" / "images"
    assert np.array_equal(SegmentationFolder(tmp_path / "out", "all")[0][0], pixels)
    assert (images / "bytes.jpg").read_bytes() == (tmp_path / "red.jpg").read_bytes()
    assert not (images / "pixels.png").is_symlink()


def test_where_links_can_not_be_made_files_are_hard_links_or_copies(tmp_path, monkeypatch):
    source = Source(WORDS, [photo(tmp_path / "raw", "a")])

    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    prepare(source, "mine", tmp_path / "hard")
    assert (tmp_path / "hard" / "images" / "a.png").samefile(tmp_path / "raw" / "a.png")
    prepare(source, "mine", tmp_path / "hard")  # again, where renaming a second hard link would do nothing
    monkeypatch.setattr(os, "link", refuse)
    prepare(source, "mine", tmp_path / "copy")
    copy = tmp_path / "copy" / "images" / "a.png"
    assert not copy.samefile(tmp_path / "raw" / "a.png")
    assert copy.read_bytes() == (tmp_path / "raw" / "a.png").read_bytes()
    assert len(list((tmp_path / "hard" / "images").iterdir())) == 1


def fail(message: str) -> np.ndarray:
    raise UserError(message)


def test_a_broken_photograph_is_left_out_and_tried_again(tmp_path):
    raw = tmp_path / "raw"
    photographs = [photo(raw, name, ("val",)) for name in ("good", "cut", "small", "high", "torn")]
    (raw / "cut.png").write_bytes((raw / "good.png").read_bytes()[:40])
    photographs[2] = photo(raw, "small", ("val",), np.zeros((2, 2), int))
    photographs[3] = photo(raw, "high", ("val",), np.full((2, 3), 3))
    photographs[4] = SourceImage("torn", ("val",), raw / "torn.png", functools.partial(fail, "torn.mat: torn"))
    manifest = prepare(Source(WORDS, photographs), "mine", tmp_path / "out")
    assert list(manifest.left_out) == ["cut", "high", "small", "torn"]
    assert "cut.png: not an image in a known format, or damaged" in manifest.left_out["cut"]
    assert manifest.left_out["small"] == "its labels are 2x2 (width x height), its image 3x2"
    assert manifest.left_out["high"] == "its labels hold the value 3, there are 3 classes"
    assert manifest.left_out["torn"] == "torn.mat: torn"
    assert (tmp_path / "out" / "val.txt").read_text() == "good.png\n"
    assert [path.name for path in (tmp_path / "out" / "labels").iterdir()] == ["good.png"]
    # Mended, the same request takes them in; one that breaks goes out.
    mended = [photo(raw, name, ("val",)) for name in ("good", "cut", "small", "high", "torn")]
    (tmp_path / "out" / "labels" / "good.png").unlink()
    (raw / "good.png").unlink()
    manifest = prepare(Source(WORDS, mended), "mine", tmp_path / "out")
    assert list(manifest.left_out) == ["good"]
    assert (tmp_path / "out" / "val.txt").read_text() == "cut.png\nsmall.png\nhigh.png\ntorn.png\n"
    assert not (tmp_path / "out" / "images" / "good.png").is_symlink()


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", ".hidden", "a/b", "a\\b", "", " a", "a\n", "a" * 201, "C:a"])
def test_a_name_that_is_no_file_name_costs_its_image_alone(tmp_path, name):
    labels = functools.partial(constant, np.zeros((2, 3), int))
    whole = photo(tmp_path / "raw", "whole", ("all",))
    source = Source(WORDS, [SourceImage(name, ("all",), tmp_path / "a.png", labels), whole])
    for _ in range(2):  # and so it stays in later runs
        manifest = prepare(source, "mine", tmp_path / "there")
        assert manifest.photographs == 1 and list(manifest.left_out) == [name]
        assert "is no plain file name" in manifest.left_out[name]
    with pytest.raises(ValueError, match="is no plain file name"):
        prepare(Source(WORDS, [SourceImage("a", (name,), tmp_path / "a.png", labels)]), "mine", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_can_not_be_prepared(tmp_path):
    one = photo(tmp_path / "raw", "a")
    for source, message in [
        (Source(WORDS, []), "the source has no images"),
        (Source(WORDS, [photo(tmp_path / "raw", "a", ("classes",))]), "a split can't be called 'classes'"),
        (Source(Vocabulary.parse([{"name": "a", "prompts": ["b"]}]), [one]), "the class 'a' can't be written"),
        (Source(Vocabulary.parse([{"name": "C #1"}]), [one]), "the class 'C #1' can't be written"),
    ]:
        with pytest.raises(ValueError, match=message):
            prepare(source, "mine", tmp_path / "out")
    with pytest.raises(ValueError, match="there is no split 'val': choose from train"):
        prepare(Source(WORDS, [one]), "mine", tmp_path / "out", splits=["val"])
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    source = Source(WORDS, [photo(tmp_path / "raw", "a", ("train", "val"))])
    before = contents(tmp_path / "raw")
    with pytest.raises(ValueError, match="raw: holds something else; choose a new or empty folder"):
        prepare(source, "mine", tmp_path / "raw")
    assert contents(tmp_path / "raw") == before
    prepare(source, "mine", tmp_path / "out")
    for other, message in [
        ({"name": "yours"}, "other source"),
        ({"options": {"a": "b"}}, "other source, other options"),
        ({"splits": ["val"]}, "other options, other splits"),
        ({"source": Source(Vocabulary.parse("road, car, sky"), source.images)}, "other splits, other classes"),
    ]:
        notes = []
        asked = {"source": source, "name": "mine"} | other
        prepare(**asked, out=tmp_path / "out", note=notes.append)
        assert notes == [f"{tmp_path / 'out'}: was prepared with {message}: it is prepared again"]
        prepare(**asked, out=tmp_path / "new")
        assert contents(tmp_path / "out") == contents(tmp_path / "new")
        shutil.rmtree(tmp_path / "new")


def test_what_another_request_made_goes_and_what_somebody_changed_stays(tmp_path):
    """Also where the run that replaces it is killed in between, at each of its changes on disk."""
    one = Source(WORDS, [photo(tmp_path / "raw", name) for name in ("a", "b", "c")])
    two = Source(WORDS, [photo(tmp_path / "raw", name, ("val",)) for name in ("c", "d")])
    prepare(two, "two", tmp_path / "whole")
    kills = 0
    for moment in range(1, 40):
        out = tmp_path / f"{moment}"
        prepare(one, "one", out)
        (out / "labels" / "a.png").write_text("corrected")
        child = os.fork()
        if child == 0:
            count = 0

            def dying(original, moment=moment):
                def change(*arguments, **settings):
                    nonlocal count
                    count += 1
                    if count == moment:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(*arguments, **settings)

                return change

            acts = ((Path, "replace"), (Path, "unlink"), (Path, "rename"), (Journal, "begin"), (Journal, "put"))
            for kind, act in acts:
                setattr(kind, act, dying(getattr(kind, act)))
            try:
                prepare(two, "two", out)
            finally:
                os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        kills += killed
        prepare(two, "two", out)
        assert (out / "labels" / "a.png.changed").read_text() == "corrected"
        assert FolderCheck(out).problems == []
        (out / "labels" / "a.png.changed").unlink()
        assert contents(out) == contents(tmp_path / "whole"), moment
        if not killed:
            break
    assert kills >= 10


def test_labels_that_somebody_corrected_are_kept(tmp_path):
    source, notes = Source(WORDS, [photo(tmp_path / "raw", name) for name in ("a", "b")]), []
    prepare(source, "mine", tmp_path / "out")
    label = tmp_path / "out" / "labels" / "b.png"
    label.write_text("corrected")
    prepare(source, "mine", tmp_path / "out", note=notes.append)
    assert (label.parent / "b.png.changed").read_text() == "corrected" and SegmentationFolder(tmp_path / "out", "train")
    assert notes == ["1 labels were changed since they were prepared: kept as *.changed"]


def test_work_that_the_version_before_had_begun_is_told(tmp_path):
    source, out, notes = Source(WORDS, [photo(tmp_path / "raw", "a")]), tmp_path / "out", []
    (out / "labels").mkdir(parents=True)
    (out / ".prepare.jsonl").write_text('{"source": "mine"}\n{"na')
    prepare(source, "mine", out, note=notes.append)
    assert notes == [f"{out}: was begun by an earlier version: it is prepared again"]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_two_runs_do_not_prepare_one_folder(tmp_path):
    source = Source(WORDS, [photo(tmp_path / "raw", "a")])
    (tmp_path / "out").mkdir()
    with hold(tmp_path / "out" / LOCK, ""), pytest.raises(ValueError, match="another run is preparing it"):
        prepare(source, "mine", tmp_path / "out")


def test_a_folder_that_can_not_be_written_is_one_line(tmp_path):
    source = Source(WORDS, [photo(tmp_path / "raw", "a")])
    with pytest.raises(ValueError, match=r"a.png[^\n]*Not a directory[^\n]*$"):
        prepare(source, "mine", tmp_path / "raw" / "a.png")
    (tmp_path / "out" / "labels").mkdir(parents=True)
    (tmp_path / "out" / JOURNAL).write_text("[]")
    with pytest.raises(ValueError, match="not the journal of an unfinished run"):
        prepare(source, "mine", tmp_path / "out")


def counted(path: Path, labels: np.ndarray) -> np.ndarray:
    """Labels that leave a line in a file whenever they are read."""
    with path.open("a") as log:
        log.write("read\n")
    return labels


def test_what_is_finished_and_whole_is_not_done_again(tmp_path):
    labels = np.array([[0, 1, -1], [2, 2, 0]])
    photographs = []
    for name in "abcd":
        read = functools.partial(counted, tmp_path / f"{name}.log", labels)
        photographs.append(SourceImage(name, ("all",), photo(tmp_path / "raw", name).image, read))
    source, out = Source(WORDS, photographs), tmp_path / "out"
    prepare(source, "mine", out)
    whole = contents(out)
    # A label that was damaged, one that is gone, and a photograph that is gone are made again.
    damaged = out / "labels" / "a.png"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    (out / "labels" / "b.png").unlink()
    (out / "images" / "c.png").unlink()
    (out / "images" / ".d.0123abcd.part.png").write_text("half")
    (out / "labels" / ".d.0123abcd.part.png").write_text("half")
    prepare(source, "mine", out)
    (out / "labels" / "a.png.changed").unlink()  # kept: somebody might have corrected it
    assert contents(out) == whole
    assert [len((tmp_path / f"{name}.log").read_text().splitlines()) for name in "abcd"] == [2, 2, 2, 1]
    # A photograph that the source no longer has goes, and one that became another file is that file.
    (out / "images" / "b.png").unlink()
    Image.new("RGB", (3, 2)).save(tmp_path / "raw" / "b.bmp")
    photographs[1] = SourceImage("b", ("all",), tmp_path / "raw" / "b.bmp", photographs[1].labels)
    prepare(Source(WORDS, photographs[1:]), "mine", out)
    assert sorted(path.name for path in (out / "labels").iterdir()) == ["b.png", "c.png", "d.png"]
    assert sorted(path.name for path in (out / "images").iterdir()) == ["b.bmp", "c.png", "d.png"]
    assert FolderCheck(out).problems == []


def slowly(number: int) -> np.ndarray:
    time.sleep(0.003)
    return np.full((2, 3), number % 3)


def many(raw: Path, count: int = 120) -> Source:
    """A source that takes a while."""
    raw.mkdir(exist_ok=True)
    names = [f"{number:03d}" for number in range(count)]
    for number, name in enumerate(names):
        if not (raw / f"{name}.png").exists():
            Image.new("RGB", (3, 2), (number, 0, 0)).save(raw / f"{name}.png")
    labels = (functools.partial(slowly, number) for number in range(count))
    return Source(
        WORDS, [SourceImage(n, ("all",), raw / f"{n}.png", read) for n, read in zip(names, labels, strict=True)]
    )


def noted(out: Path) -> int:
    """How many rows the journal has: the request and the finished photographs."""
    path = out / JOURNAL
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=30)) as rows:
            return rows.execute("SELECT count(*) FROM done").fetchone()[0]
    except sqlite3.OperationalError:  # not there, or without its table
        return 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, to be quick")
def test_killed_at_any_time_it_goes_on_to_the_same_folder(tmp_path):
    source, out = many(tmp_path / "raw"), tmp_path / "killed"
    prepare(source, "mine", tmp_path / "whole")
    kills = 0
    # Killed when about so many are noted; the instant within a photograph is left to chance.
    for lines in (0, 1, 2, 20, 40, 41, 60, 80, 100, 120):
        child = os.fork()
        if child == 0:
            try:
                prepare(source, "mine", out)
            finally:
                os._exit(0)
        while noted(out) < lines and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.0005)
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert read_manifest(out) is None or kills >= 9
    assert kills >= 9
    prepare(source, "mine", out)
    assert contents(out) == contents(tmp_path / "whole")


SCRIPT = """
import sys
from pathlib import Path
from tests.test_prepare import many, prepare

if __name__ == "__main__":
    raw, out = map(Path, sys.argv[1:])
    prepare(many(raw), "mine", out, workers=2)
"""


@pytest.mark.slow
def test_workers_write_what_one_process_writes_and_are_not_left_behind(tmp_path):
    source, out = many(tmp_path / "raw"), tmp_path / "2"
    (tmp_path / "raw" / "007.png").write_text("broken")
    steps = []
    prepare(source, "mine", tmp_path / "1", progress=steps.append)
    assert sum(steps) == 120
    (tmp_path / "script.py").write_text(SCRIPT)

    def start() -> subprocess.Popen:
        root = str(Path(__file__).parents[1])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, *sys.path])}
        command = [sys.executable, tmp_path / "script.py", tmp_path / "raw", out]
        return subprocess.Popen(command, env=environment, start_new_session=True)

    killed = start()
    while killed.poll() is None and noted(out) < 30:
        time.sleep(0.001)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while (left := processes_of_group(killed.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
    assert start().wait() == 0
    assert contents(out) == contents(tmp_path / "1")


def processes_of_group(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = entry.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # gone in the meantime
        if int(process_group) == group and state != "Z":
            found.append(int(entry.parent.name))
    return found


@pytest.fixture
def whole(tmp_path) -> Path:
    """A prepared folder of three photographs."""
    photographs = [photo(tmp_path / "raw", name, ("val",)) for name in "abc"]
    prepare(Source(WORDS, photographs, evaluation_split="val"), "mine", tmp_path / "out")
    return tmp_path / "out"


def problems(folder: Path, *, quick: bool = False) -> list[str]:
    found = FolderCheck(folder)
    found.look(quick=quick)
    return [problem.replace(f"{folder}/", "") for problem in found.problems]


def test_a_whole_folder_has_no_problems(whole):
    assert problems(whole) == problems(whole, quick=True) == []
    assert FolderCheck(whole).splits == {"val": 3}


def test_check_names_what_is_wrong(whole, tmp_path):
    (tmp_path / "raw" / "a.png").unlink()
    label = whole / "labels" / "b.png"
    label.write_bytes(label.read_bytes()[:-1] + b"x")
    (whole / "labels" / "c.png").unlink()
    (whole / "images" / "d.png").write_text("not listed")
    expected = [
        "images/: 1 files belong to no listed image, the first is d.png",
        f"images/a.png: the image it links to is missing ({tmp_path / 'raw' / 'a.png'})",
        "labels/b.png: its content has changed since it was prepared",
        "labels/c.png: missing",
    ]
    assert problems(whole) == expected
    assert problems(whole, quick=True) == [expected[0], expected[1], expected[3]]


def test_check_compares_lists_classes_and_records(whole):
    (whole / "images" / "a.png").unlink()
    (whole / "classes.txt").write_text("road\ncar\nsky\n")
    lines = (whole / "files.jsonl").read_text().splitlines(keepends=True)
    (whole / "files.jsonl").write_text("".join(lines[:2]))
    found = problems(whole)
    assert found[0] == "val.txt: a.png is not in images/"
    assert found[1] == "classes.txt: not the classes in the manifest"
    assert found[2] == "val.txt: names 2 images in images/, the manifest 3"
    assert found[3] == "files.jsonl: missing, or not the one that the manifest was written with"
    assert found[4] == "labels/: 1 files belong to no listed image, the first is a.png"
    assert found[5:] == ["images/c.png: files.jsonl does not have it"]
    (whole / "val.txt").unlink()
    with pytest.raises(ValueError, match="has no split list"):
        problems(whole)


def test_check_of_a_folder_without_manifest_looks_at_values_and_sizes(whole):
    (whole / "manifest.json").unlink()
    assert problems(whole) == []
    Image.fromarray(np.full((2, 3), 9, np.uint8)).save(whole / "labels" / "a.png")
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(whole / "labels" / "b.png")
    first, second = problems(whole)
    assert first == "labels/a.png: holds the value 9; classes.txt has 3 classes, 255 is unlabelled"
    assert second == "labels/b.png: is 3x3, its image 3x2 (width x height)"


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"format": 2}', '{"splits": {"../x": 1}}', "[" * 100_000, '{"format": 1e999}']
)
def test_a_manifest_that_is_none_is_one_line(whole, content):
    (whole / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest.json: [^\n]+$"):
        FolderCheck(whole)


def test_records_can_not_lead_out_of_the_folder(whole):
    text = (whole / "files.jsonl").read_text().replace('"a.png"', '"../../raw/a.png"')
    (whole / "files.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"files.jsonl: line 1: image.file: .* is no plain file name"):
        FolderCheck(whole)


def voc(root: Path) -> Path:
    """A VOC 2012 with one photograph of two."""
    for name in ("2007_000033", "2007_000061"):
        for part, image in (("JPEGImages", Image.new("RGB", (3, 2))), ("SegmentationClass", Image.new("P", (3, 2), 5))):
            (root / part).mkdir(parents=True, exist_ok=True)
            image.save(root / part / f"{name}{'.jpg' if part == 'JPEGImages' else '.png'}")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("2007_000033\n2007_000061\n")
    return root


def test_the_command_line(run, tmp_path):
    source, out = voc(tmp_path / "VOC2012"), tmp_path / "voc"
    code, stdout, stderr = run("data", "prepare", "pascal_voc_20", "--source", tmp_path, "--out", out)
    assert code == 0
    assert "val                  2 images of 1,449" in stdout
    assert "train                0 images of 1,464" in stdout
    assert stdout.endswith("voc: 2 images, 20 classes\n")
    shortfall = [
        "train: 1,464 of 1,464 images are missing; if that is meant, prepare the other split alone with --split",
        "val: 1,447 of 1,449 images are missing",
    ]
    assert stderr.splitlines()[1:3] == [f"note: {line}" for line in shortfall]
    code, stdout, stderr = run("data", "check", out)
    assert (code, stdout.splitlines()[-1]) == (1, f"{out}: 2 problems")
    assert stderr.splitlines()[1:3] == shortfall
    (source / "JPEGImages" / "2007_000061.jpg").unlink()
    code, stdout, stderr = run("data", "check", out, "--quick", "--workers", 1)
    assert code == 1
    assert "val                  1 image of 1,449" in stdout
    assert stderr.splitlines()[1].startswith(f"{out}/images/2007_000061.jpg: the image it links to is missing")
    assert "is obtained from http://host.robots.ox.ac.uk/pascal/VOC/voc2012/" in stderr
    code, stdout, stderr = run("data", "prepare", "pascal_voc_20", "--source", source, "--out", out)
    assert code == 1
    assert [line.partition(": ")[0] for line in stderr.splitlines()][-2:] == ["left out", "1 left out"]
    assert "left out: 2007_000061: " in stderr


def test_a_split_alone_and_an_interruption(run, tmp_path, monkeypatch):
    arguments = ("data", "prepare", "pascal_voc_20", "--source", voc(tmp_path / "VOC2012"), "--out", tmp_path / "voc")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("opensan.data.prepare.engine.prepare", interrupt)
        code, stdout, stderr = run(*arguments, "--split", "val")
    assert (code, stdout, stderr) == (130, "", "interrupted: the same command goes on where it was\n")
    code, stdout, _ = run(*arguments, "--split", "val")
    assert (code, "val " in stdout, "1,464" in stdout) == (0, True, False)
    code, stdout, _ = run("data", "check", tmp_path / "voc")
    assert (code, "1,464" in stdout) == (1, False)


def test_the_command_line_says_what_it_would_take(run, tmp_path):
    code, stdout, _ = run("data", "list")
    assert code == 0
    for name in (
        "coco_stuff_171",
        "pascal_voc_20",
        "pascal_context_59",
        "pascal_context_459",
        "ade20k_150",
        "ade20k_847",
    ):
        assert name in stdout
    code, stdout, _ = run("data", "list", "coco_stuff_171")
    assert code == 0
    assert "classes: 171\nimages: train 118,287, val 5,000\n" in stdout
    assert "https://cocodataset.org" in stdout
    for arguments, code, message in [
        (["list", "nothing"], 2, "no data set is called 'nothing': choose from coco_stuff_171, "),
        (
            ["prepare", "ade20k_150", "--source", tmp_path / "no", "--out", tmp_path / "o"],
            1,
            "no: no such folder; it must",
        ),
        (["prepare", "ade20k_150", "a=b", "--source", tmp_path, "--out", tmp_path / "o"], 2, "has no option 'a=b'"),
        (
            ["prepare", "ade20k_150", "--source", tmp_path, "--out", tmp_path / "o"],
            1,
            "it must be ADEChallengeData2016",
        ),
        (["check", tmp_path / "no"], 1, "no: no such folder"),
        (["check", tmp_path], 1, "not a prepared folder, it has no classes.txt"),
    ]:
        found, stdout, stderr = run("data", *arguments)
        assert (found, stdout) == (code, "")
        assert message in stderr and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_the_table_shows_images_and_pixels_of_each_class(run, tmp_path):
    from opensan.data.prepare import own_folder

    source = tmp_path / "mine"
    for part in ("images", "labels"):
        (source / part).mkdir(parents=True)
    (source / "classes.txt").write_text("road\ncar|automobile\nsky\n")
    for name, values in (("a", [[0, 0, 1]]), ("b", [[0, 255, 255]])):
        Image.new("RGB", (3, 1)).save(source / "images" / f"{name}.png")
        Image.fromarray(np.array(values, np.uint8)).save(source / "labels" / f"{name}.png")
    assert own_folder.READER.name == "folder"
    code, stdout, stderr = run("data", "prepare", "folder", "--source", source, "--out", tmp_path / "out")
    assert (code, stderr) == (0, "note: 1 of 3 classes have no pixel: sky\n")
    table = [line.split() for line in stdout.splitlines()]
    assert table[0] == ["all", "2", "images"]
    assert table[1:] == [
        ["class", "images", "pixels", "share"],
        ["road", "2", "3", "50.00%"],
        ["car", "1", "1", "16.67%"],
        ["sky", "0", "0", "0.00%"],
        ["unlabelled", "2", "33.33%"],
        [f"{tmp_path / 'out'}:", "2", "images,", "3", "classes"],
    ]
    code, stdout, stderr = run("data", "check", tmp_path / "out")
    assert (code, stdout.splitlines()[2].split()) == (0, ["road", "2", "3", "50.00%"])
    # Without a manifest the same is counted from the labels.
    (tmp_path / "out" / "manifest.json").unlink()
    code, stdout, stderr = run("data", "check", tmp_path / "out")
    assert (code, stdout.splitlines()[2].split()) == (0, ["road", "2", "3", "50.00%"])


def test_a_set_without_a_labelled_pixel_is_not_finished(tmp_path):
    source = Source(WORDS, [photo(tmp_path / "raw", "a", labels=np.full((2, 3), -1))], unlabelled_because="so it is")
    with pytest.raises(ValueError, match="out: not finished: no pixel of 1 images is labelled: so it is"):
        prepare(source, "mine", tmp_path / "out")
    assert read_manifest(tmp_path / "out") is None


def test_check_names_a_folder_without_a_labelled_pixel(whole):
    (whole / "manifest.json").unlink()
    for name in "abc":
        Image.fromarray(np.full((2, 3), 255, np.uint8)).save(whole / "labels" / f"{name}.png")
    assert problems(whole) == ["labels/: no pixel of 3 images is labelled"]


def partly(labels: np.ndarray) -> Labelled:
    return Labelled(labels, ("object 7: has only a box",))


def test_what_is_left_out_of_an_image_is_named_in_every_run_until_it_is_mended(tmp_path):
    one = photo(tmp_path / "raw", "a")
    labels = np.array([[0, 1, -1], [2, 2, 0]])
    partial = dataclasses.replace(one, labels=functools.partial(partly, labels))
    for _ in range(2):
        manifest = prepare(Source(WORDS, [partial]), "mine", tmp_path / "out")
        assert manifest.left_out == {"a (in part)": "object 7: has only a box"}
    assert any("object 7" in problem for problem in problems(tmp_path / "out"))
    assert prepare(Source(WORDS, [one]), "mine", tmp_path / "out").left_out == {}


def test_a_name_that_is_no_utf_8_is_named_and_left_out(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    labels = functools.partial(constant, np.zeros((2, 3), int))
    photographs = [SourceImage(name, ("all",), tmp_path / "no.png", labels), photo(tmp_path / "raw", "a", ("all",))]
    manifest = prepare(Source(WORDS, photographs), "mine", tmp_path / "out")
    assert list(manifest.left_out) == ["caf\\udce9"] and manifest.photographs == 1


def test_two_images_of_one_name_are_left_out_and_the_others_stay(tmp_path):
    one, other = (photo(tmp_path / "raw", name, ("all",)) for name in "ab")
    manifest = prepare(Source(WORDS, [one, one, other]), "mine", tmp_path / "out")
    assert manifest.left_out == {"a": "2 images have this name, so labels could be either's; rename all but one"}
    assert manifest.photographs == 1
