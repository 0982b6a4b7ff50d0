"""Whole folders: what is done once is not done again, whatever happened in between."""

import json
import multiprocessing
import os
import random
import re
import shutil
import sqlite3
import threading
import time
import warnings
import weakref
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import opensan
from opensan.cli import main
from opensan.errors import UserError
from opensan.images import list_images
from opensan.jobs.folder import (
    OF_THE_DISK,
    Broken,
    FolderRun,
    Job,
    Question,
    Written,
    complete_data_sets,
    label_one,
    plan,
    without_results,
)
from opensan.jobs.ledger import Ledger
from opensan.outputs import DATASETS, FORMATS, check_writable
from opensan.segmenters.san import SanSegmenter
from opensan.vocabulary import Vocabulary

ALL = (*FORMATS, *DATASETS)
WORDS = "road, car|automobile, sky"
BOOKS = ("manifest.sqlite", "manifest.sqlite-journal", ".opensan.lock")


@pytest.fixture
def segmenter(model_folder):
    return opensan.load(model_folder)


def photographs(folder: Path, count: int, sizes: tuple[tuple[int, int], ...] = ((60, 45), (45, 60))) -> Path:
    for number in range(count):
        path = folder / f"{number % 3}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(sizes[number % len(sizes)]).save(path)
    return folder


def run_folder(segmenter, folder: Path, out: Path, formats=("png",), words=WORDS, batch=1):
    """(places written, reasons of broken ones, notes)"""
    jobs = plan(list_images([folder]), [folder])
    with FolderRun(segmenter, Vocabulary.parse(words), jobs, out, formats, batch=batch) as run:
        results = list(run.results())
    written = [result.job.stem for result in results if isinstance(result, Written)]
    return written, [result.reason for result in results if isinstance(result, Broken)], run.notes


def contents(out: Path) -> dict[str, bytes]:
    """Of all files but those that say when and where; of confidences four digits, since which images share a batch
    changes the ninth, and a mean on the edge is then rounded the other way."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name not in (*BOOKS, "data.yaml"))
    return {
        path.relative_to(out).as_posix(): re.sub(rb"\b0\.\d{5,}", lambda match: b"%.4f" % float(match[0]), content)
        if path.suffix == ".json"
        else content
        for path, content in ((path, path.read_bytes()) for path in files)
    }


def records(out: Path) -> list[dict]:
    """What the ledger says of images; a run may be writing it."""
    if not (out / "manifest.sqlite").exists():
        return []
    with closing(sqlite3.connect(out / "manifest.sqlite", timeout=30)) as rows:
        tables = rows.execute("SELECT name FROM sqlite_schema").fetchall()
        found = rows.execute("SELECT value FROM done WHERE key GLOB 'image *' ORDER BY rowid") if tables else []
        return [json.loads(value) for (value,) in found]


def test_second_run_does_nothing(segmenter, tmp_path):
    folder, out = photographs(tmp_path / "in", 5), tmp_path / "out"
    written, broken, notes = run_folder(segmenter, folder, out, ALL)
    assert len(written) == 5 and not broken and not notes
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name.startswith("00")}
    assert run_folder(segmenter, folder, out, ALL) == ([], [], [])
    assert run_folder(segmenter, folder, out, ["png"]) == ([], [], [])
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_only_what_is_missing_or_new_is_done(segmenter, tmp_path):
    folder, out = photographs(tmp_path / "in", 6), tmp_path / "out"
    run_folder(segmenter, folder, out, ["png", "yolo"])
    whole = contents(out)
    (out / "0" / "000.labels.png").unlink()
    (out / "yolo" / "labels" / "1" / "001.txt").unlink()
    shutil.copyfile(folder / "0" / "000.png", folder / "2" / "002.png")  # another photograph
    (folder / "2" / "009.jpg").write_text("no image")
    written, broken, _ = run_folder(segmenter, folder, out, ["png", "yolo"])
    assert sorted(written) == ["0/000", "1/001", "2/002"] and len(broken) == 1 and "009.jpg" in broken[0]
    found = contents(out)
    assert found.keys() == whole.keys()
    assert found["2/002.labels.png"] == whole["0/000.labels.png"]
    (folder / "2" / "009.jpg").unlink()
    written, *_ = run_folder(segmenter, folder, out, ["png", "yolo", "json"])  # one format more
    assert len(written) == 6


def test_copied_results_are_still_complete(segmenter, tmp_path):
    folder = photographs(tmp_path / "in", 3)
    run_folder(segmenter, folder, tmp_path / "out")
    time.sleep(0.01)
    shutil.copytree(tmp_path / "out", tmp_path / "copy", copy_function=shutil.copyfile)
    assert run_folder(segmenter, folder, tmp_path / "copy") == ([], [], [])


def test_other_words_or_model_are_told_and_done_again(segmenter, tmp_path):
    folder, out = photographs(tmp_path / "in", 3), tmp_path / "out"
    run_folder(segmenter, folder, out)
    written, _, notes = run_folder(segmenter, folder, out, words="tree, sky")
    assert len(written) == 3 and notes == ["3 of 3 images were done with other words: they are done again"]
    segmenter.identity = replace(segmenter.identity, image="another")
    written, _, notes = run_folder(segmenter, folder, out, words="tree, sky, sea")
    assert len(written) == 3
    assert notes == ["3 of 3 images were done with another model, other words: they are done again"]
    assert [record["place"] for record in records(out)] == written


def test_what_somebody_changed_is_kept(segmenter, tmp_path):
    folder, out = photographs(tmp_path / "in", 2), tmp_path / "out"
    run_folder(segmenter, folder, out)
    right = (out / "0/000.labels.png").read_bytes()
    (out / "0/000.labels.png").write_bytes(b"corrected by hand")
    written, _, notes = run_folder(segmenter, folder, out)
    assert written == ["0/000"] and notes == ["1 results were changed since they were written: kept as *.changed"]
    assert (out / "0/000.labels.png").read_bytes() == right
    assert (out / "0/000.labels.png.changed").read_bytes() == b"corrected by hand"
    (out / "0/000.labels.png").write_bytes(b"again")
    run_folder(segmenter, folder, out, words="other")
    assert (out / "0/000.labels.png.changed2").read_bytes() == b"again"


@pytest.mark.parametrize("batch", [1, 4])
def test_mixed_shapes_and_batches_change_nothing(segmenter, tmp_path, batch):
    folder = photographs(tmp_path / "in", 11, ((60, 45), (45, 60), (100, 30), (33, 33), (60, 44)))
    written, *_ = run_folder(segmenter, folder, tmp_path / "out", batch=batch)
    assert len(written) == len(set(written)) == 11
    for path in list_images([folder]):
        found = np.asarray(Image.open(tmp_path / "out" / path.relative_to(folder).with_suffix(".labels.png")))
        assert (found == segmenter.segment(path, WORDS).labels).mean() > 0.999


def change_rows(out: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(out / "manifest.sqlite")) as rows, rows:
        rows.execute(statement, values)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE done SET value = replace(value, '0/000.labels.png', '../mine.txt')",
        "UPDATE done SET value = replace(value, '\"0/000\"', '\"../mine.txt\"')",
        "UPDATE done SET value = replace(value, '0/000.labels.png', 'MINE')",
        'UPDATE done SET value = replace(value, \'"source": [\', \'"source": ["x", \')',
        "UPDATE done SET value = substr(value, 1, 40)",
        "UPDATE done SET value = x'00ff00' WHERE key GLOB 'image *'",
        "UPDATE done SET value = '[]'",
        "CREATE TRIGGER t AFTER INSERT ON done BEGIN DELETE FROM done; END",
        "CREATE VIEW v AS SELECT 1",
        "DROP TABLE done",
    ],
)
def test_nothing_in_a_manifest_is_believed(segmenter, tmp_path, change):
    folder, out = photographs(tmp_path / "in", 2), tmp_path / "out"
    run_folder(segmenter, folder, out)
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    change_rows(out, change.replace("MINE", str(mine)))
    written, _, _ = run_folder(segmenter, folder, out)
    assert written and mine.read_text() == "mine"
    assert sorted(record["place"] for record in records(out)) == ["0/000", "1/001"]


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + b"\xff" * 2000])
def test_a_damaged_ledger_is_kept_aside_and_told(segmenter, tmp_path, content):
    folder, out = photographs(tmp_path / "in", 2), tmp_path / "out"
    run_folder(segmenter, folder, out)
    (out / "manifest.sqlite").write_bytes(content)
    written, _, notes = run_folder(segmenter, folder, out)
    assert len(written) == 2 and notes == [f"{out / 'manifest.sqlite'}: was damaged, kept as manifest.sqlite.damaged"]
    assert (out / "manifest.sqlite.damaged").read_bytes() == content


def test_the_ledger_of_an_earlier_version_is_taken_over(segmenter, tmp_path):
    """Version 0.1.0 had manifest.jsonl: what it says is neither ignored nor lost."""
    folder, out = photographs(tmp_path / "in", 3), tmp_path / "out"
    run_folder(segmenter, folder, out)
    with closing(sqlite3.connect(out / "manifest.sqlite")) as rows:
        ((key, settings),) = rows.execute("SELECT key, value FROM done WHERE key GLOB 'settings *'")
    lines = [{"settings_key": key.removeprefix("settings "), **json.loads(settings)}, *records(out)]
    old = [json.dumps(line) for line in lines] + ['{"place": "0/0']  # a killed run's half line
    (out / "manifest.sqlite").unlink()
    (out / "manifest.jsonl").write_text("\n".join(old))
    (out / "1" / "001.labels.png").write_text("corrected")
    written, _, notes = run_folder(segmenter, folder, out)
    assert written == ["1/001"] and (out / "1" / "001.labels.png.changed").read_text() == "corrected"
    assert notes[0].startswith(f"{out / 'manifest.jsonl'}: of an earlier version") and len(notes) == 2
    assert run_folder(segmenter, folder, out) == ([], [], [])
    assert not (out / "manifest.jsonl").exists()


def test_two_runs_do_not_share_a_folder(segmenter, tmp_path):
    folder, out = photographs(tmp_path / "in", 1), tmp_path / "out"
    out.mkdir()
    with Ledger(out), pytest.raises(ValueError, match="another run is writing there"):
        run_folder(segmenter, folder, out)
    assert run_folder(segmenter, folder, out)[0] == ["0/000"]


def test_left_over_files_go_and_others_stay(segmenter, tmp_path):
    folder, out = photographs(tmp_path / "in", 1), tmp_path / "out"
    left = [
        "0/.000.labels.abcd_123.part.png",
        "voc/JPEGImages/0/.000.abcd_123.part.png",
        "voc/.labelmap.abcdefgh.part.txt",
    ]
    others = ["0/.other.labels.abcd_123.part.png", "0/.000.labels.part.png", "0/000.labels.abcd_123.part.png"]
    for name in (*left, *others):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")
    run_folder(segmenter, folder, out, ["png", "voc"])
    assert [name for name in (*left, *others) if (out / name).exists()] == others


def test_a_write_error_belongs_to_its_image(segmenter, tmp_path):
    folder = photographs(tmp_path / "in", 3)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "1").write_text("in the way")
    written, broken, _ = run_folder(segmenter, folder, tmp_path / "out", ["png", "coco"])
    assert written == ["0/000", "2/002"]
    assert len(broken) == 1 and broken[0].startswith(f"{folder}/1/001.png: its results can't be written to ")
    assert "\n" not in broken[0]
    images = json.loads((tmp_path / "out" / "coco/annotations/instances_all.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["0/000.png", "2/002.png"]


@pytest.mark.parametrize("number", sorted(OF_THE_DISK))
def test_a_full_disk_ends_the_run_with_its_name(segmenter, tmp_path, monkeypatch, number):
    def full(*_, **__):
        raise OSError(number, os.strerror(number))

    folder, out = photographs(tmp_path / "in", 3), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(UserError, match=re.escape(f"{out}: cannot write there ({os.strerror(number)})")):
            run_folder(segmenter, folder, out)
    assert records(out) == [] and not list(out.rglob("*.part*"))
    assert len(run_folder(segmenter, folder, out)[0]) == 3


@pytest.mark.parametrize("formats", [["png"], ["png", "overlay", "json"], [*ALL]])
def test_a_long_name_costs_its_image_alone(segmenter, tmp_path, formats):
    """255 bytes are what a name may have. Temporary names need no more than the results' own."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    names = ["a", "b" * 236, "\u4e16" * 78, "c" * 246, "d"]
    for name in names:
        Image.new("RGB", (64, 48), "teal").save(folder / f"{name}.png")
    for _ in range(2):
        written, broken, _ = run_folder(segmenter, folder, out, formats)
        assert len(broken) == 1 and broken[0].startswith(f"{folder / names[3]}.png: its results can't be written")
    assert [record["place"] for record in records(out)] == [names[0], names[1], names[4], names[2]]
    assert written == []


def test_names_that_are_not_utf_8(segmenter, tmp_path):
    """As old archives and cameras have them. Data sets list names as text, and can't."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    names = [b"caf\xe9.png", b"a.png", b"\xff\xfe.png", b"z.png"]
    for name in names:
        Image.new("RGB", (64, 48), "teal").save(folder / os.fsdecode(name))
    written, broken, _ = run_folder(segmenter, folder, out, ["png", "overlay", "json"])
    assert len(written) == 4 and not broken
    assert run_folder(segmenter, folder, out, ["png", "overlay", "json"]) == ([], [], [])
    written, broken, _ = run_folder(segmenter, folder, out, ALL)
    assert sorted(written) == ["a", "z"] and len(broken) == 2 and all("not UTF-8" in reason for reason in broken)


@pytest.mark.parametrize("how", ["renamed over", "written again", "cut"])
def test_an_image_that_is_replaced_while_it_is_read_is_done_again(segmenter, tmp_path, monkeypatch, how):
    folder, out = photographs(tmp_path / "in", 2), tmp_path / "out"
    image, other = folder / "0" / "000.png", tmp_path / "other.png"
    Image.effect_noise((60, 45), 90).convert("RGB").save(other)
    through = SanSegmenter.read

    def read(self, path):
        found = through(self, path)
        if path == image:
            if how == "renamed over":
                shutil.copy(other, folder / "new")
                (folder / "new").replace(image)
            elif how == "written again":
                image.write_bytes(other.read_bytes())
            else:
                image.write_bytes(image.read_bytes()[:60])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(SanSegmenter, "read", read)
        assert len(run_folder(segmenter, folder, out)[0]) == 2
    written, broken, _ = run_folder(segmenter, folder, out)
    assert (written, len(broken)) == (([], 1) if how == "cut" else (["0/000"], 0))
    if how != "cut":
        found = np.asarray(Image.open(out / "0/000.labels.png"))
        np.testing.assert_array_equal(found, segmenter.segment(image, WORDS).labels)


class Counting(SanSegmenter):
    """Counts the images that are in memory."""

    def __init__(self, *arguments, **settings) -> None:
        super().__init__(*arguments, **settings)
        self.alive, self.most, self.lock = 0, 0, threading.Lock()

    def read(self, image):
        found = super().read(image)
        with self.lock:
            self.alive += 1
            self.most = max(self.most, self.alive)
        weakref.finalize(found.image, self._gone)
        return found

    def _gone(self) -> None:
        with self.lock:
            self.alive -= 1


@pytest.mark.parametrize("batch", [1, 4])
def test_no_more_images_are_in_memory_than_documented(small_model, tmp_path, batch):
    """Odd shapes wait for others of theirs: here each image has a shape of its own."""
    long_sides = range(96, 385, 32)
    folder = photographs(
        tmp_path / "in", 19, (*((side, 96) for side in long_sides), *((96, side) for side in long_sides))
    )
    segmenter = Counting(small_model, text_cache=False)
    written, *_ = run_folder(segmenter, folder, tmp_path / "out", batch=batch)
    assert len(written) == 19
    assert 2 * batch <= segmenter.most <= 4 * batch


def _label_in_process(model: Path, question: Question, jobs: list[Job]) -> list[Written | Broken]:
    torch.set_num_threads(1)
    segmenter = opensan.load(model)
    return [label_one(segmenter, question, job) for job in jobs]


def test_another_scheduler_can_drive_the_work(model_folder, segmenter, tmp_path, one_thread):
    """The jobs go through processes that know no ledger, which is filled afterwards: the same as a run's."""
    folder, out = photographs(tmp_path / "in", 8), tmp_path / "out"
    (folder / "broken.png").write_text("no image")
    run_folder(segmenter, folder, tmp_path / "run", ["png", "coco"])
    jobs = plan(list_images([folder]), [folder])
    question = Question(Vocabulary.parse(WORDS), check_writable(out), ("png", "coco"))
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        parts = pool.map(_label_in_process, [model_folder] * 3, [question] * 3, [jobs[i::3] for i in range(3)])
        found = [one for part in parts for one in part]
    assert [one.job.image.name for one in found if isinstance(one, Broken)] == ["broken.png"]
    with Ledger(out) as ledger:
        for one in found:
            if isinstance(one, Written):
                ledger.add(one.record)
        complete_data_sets(question, jobs, ledger.records)
    assert contents(out) == contents(tmp_path / "run")
    written, broken, _ = run_folder(segmenter, folder, out, ["png", "coco"])
    assert written == [] and len(broken) == 1


def test_results_below_the_photographs_are_left_out(tmp_path):
    folder = photographs(tmp_path, 3)
    images = list_images([folder])
    shutil.copytree(folder / "0", folder / "out" / "coco")
    assert without_results(list_images([folder]), [folder], folder / "out") == images


def test_results_of_other_runs_are_no_photographs(tmp_path):
    folder = photographs(tmp_path, 3)
    images = list_images([folder])
    (folder / "earlier").mkdir()
    ours = [folder / "earlier" / f"000{suffix}" for suffix in (".labels.png", ".overlay.png")]
    for path in ours:
        shutil.copy(images[0], path)
    assert without_results(list_images([folder]), [folder], tmp_path / "out") == images
    assert without_results(list_images([folder]), [folder], folder) == images
    assert without_results([ours[0]], [ours[0]], tmp_path / "out") == [ours[0]]  # who names one means it
    with pytest.raises(ValueError, match="no images but the results of earlier runs"):
        without_results(ours, [folder / "earlier"], tmp_path / "out")


def _work(model: Path, folder: Path, out: Path) -> None:
    """In a process that is going to be killed."""
    torch.set_num_threads(1)
    run_folder(opensan.load(model), folder, out, ALL, batch=2)


@pytest.fixture
def one_thread():
    """Sums are then taken in the same order whichever photographs share a batch: files are equal to the byte."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(os.name != "posix", reason="needs fork")
def test_killed_at_any_moment_each_output_comes_once(model_folder, segmenter, tmp_path, one_thread):
    """SIGKILL at random moments, again and again, then a run to the end: the same as undisturbed."""
    folder, out = photographs(tmp_path / "in", 40), tmp_path / "out"
    run_folder(segmenter, folder, tmp_path / "undisturbed", ALL, batch=2)
    context = multiprocessing.get_context("forkserver")  # torch is imported once, and no thread is forked
    context.set_forkserver_preload(
        ["opensan.jobs.folder", "opensan.segmenters.san", "faster_coco_eval.mask", "scipy.spatial"]
    )
    chance = random.Random(0)
    done: dict[str, dict] = {}
    kills = 0
    while len(done) < 25:
        process = context.Process(target=_work, args=(model_folder, folder, out))
        process.start()
        enough = len(done) + chance.randint(0, 4)
        while len(records(out)) < enough and process.is_alive():
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -9
        now = {record["place"]: record["files"] for record in records(out)}
        assert done.items() <= now.items()  # what was done stays done, to the time of its files
        done = now
        kills += 1
    assert kills >= 5
    assert len(run_folder(segmenter, folder, out, ALL, batch=2)[0]) == 40 - len(done)
    assert done.items() <= {record["place"]: record["files"] for record in records(out)}.items()
    assert sorted(record["place"] for record in records(out)) == sorted({record["place"] for record in records(out)})
    assert len(records(out)) == 40
    assert contents(out) == contents(tmp_path / "undisturbed")
    assert not [path for path in out.rglob("*") if ".part" in path.name]


def test_images_that_are_called_like_results_are_named_when_they_are_passed_over(tmp_path):
    for name in ("a.png", "street.overlay.png", "field.labels.png", "a.labels.png", "a.overlay.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    images = [tmp_path / name for name in ("a.png", "a.labels.png", "a.overlay.png")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # results of an image that is there need no word
        assert without_results(images, [tmp_path], tmp_path / "out") == images[:1]
    everything = [tmp_path / "field.labels.png", tmp_path / "street.overlay.png", *images]
    with pytest.warns(
        UserWarning, match=r"called like results of earlier runs: .*field.labels.png, .*street.overlay.png;"
    ):
        assert without_results(everything, [tmp_path], tmp_path / "out") == images[:1]
    # Named themselves, they are images like others.
    assert without_results(everything[:1], everything[:1], tmp_path / "out") == everything[:1]


def label_into(out: Path, image: Path) -> object:
    """Label one image by the command; return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(["segment", str(image), "--model", "tiny", "--words", "sand, grass", "--out", str(out), "--format", "png"])
    return ended.value.code or 0


def test_single_images_of_one_stem_keep_their_results(tmp_path, capsys):
    folder, out = photographs(tmp_path / "in", 2), tmp_path / "out"
    first, second = sorted(folder.rglob("*.png"))
    names = [tmp_path / name for name in ("a.png", "a.bmp", "b/a.png", "b/a.bmp", "moved/a.png")]
    for name in names:
        name.parent.mkdir(exist_ok=True)
        with Image.open(second if name.parent.name == "b" else first) as image:
            image.rotate(90 * (name.suffix == ".bmp"), expand=True).save(name)
    assert label_into(out, names[0]) == 0
    assert label_into(out, names[1]) == 0  # another suffix: its whole name
    assert "named by the whole name, a.bmp.*" in capsys.readouterr().err
    labels = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert labels.keys() == {"a.labels.png", "a.bmp.labels.png"}
    for other in names[2:4]:  # another folder, the same name
        assert label_into(out, other) == 1
        assert f"{out}: holds the results of {names[names.index(other) - 2]}" in capsys.readouterr().err
    shutil.copy(names[0], names[4])  # the same image, moved
    assert label_into(out, names[4]) == 0
    assert label_into(out, names[0]) == 0  # again, and edited
    with Image.open(second) as image:
        image.save(names[0])
    assert label_into(out, names[0]) == 0
    now = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert now.keys() == labels.keys() and now["a.bmp.labels.png"] == labels["a.bmp.labels.png"]
    assert now["a.labels.png"] != labels["a.labels.png"]


def test_folders_of_equal_names_do_not_replace_each_other(segmenter, tmp_path):
    one, other, out = photographs(tmp_path / "one", 2), photographs(tmp_path / "other", 3), tmp_path / "out"
    for number, path in enumerate(sorted(other.rglob("*.png"))):
        Image.fromarray(np.full((40, 60 + number, 3), 90, np.uint8)).save(path)
    run_folder(segmenter, one, out)
    before = {path.name: path.read_bytes() for path in out.rglob("*.png")}
    with pytest.raises(UserError, match=rf"{out}: holds the results of {one}.*choose another folder"):
        run_folder(segmenter, other, out)
    assert {path.name: path.read_bytes() for path in out.rglob("*.png")} == before
    moved = one.rename(tmp_path / "elsewhere")
    assert run_folder(segmenter, moved, out)[0] == []  # known by their content


def test_images_come_from_a_list(model_folder, segmenter, tmp_path, monkeypatch, capsys):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.chdir(tmp_path)
    folder = photographs(Path("in"), 4)
    images = [str(path) for path in list_images([folder])]
    Path("list.txt").write_text("\n".join([images[2], "", images[0], images[2], "in/missing.png"]) + "\n")
    asked = ["-w", WORDS, "-m", str(model_folder), "--format", "png"]
    with pytest.raises(SystemExit) as ended:
        main(["segment", "@list.txt", "-o", "out", *asked])
    assert ended.value.code == 1 and "missing.png: can't be read" in capsys.readouterr().err
    run_folder(segmenter, folder, Path("whole"))
    found, whole = contents(Path("out")), contents(Path("whole"))
    assert len(found) == 2 and found.items() <= whole.items()
    pyarrow.parquet.write_table(pyarrow.table({"path": images[:2], "label": [1, 2]}), "list.parquet")
    results = opensan.label_folder("@list.parquet", WORDS, model=segmenter, out="again", formats=["png"])
    assert [str(written.job.image) for written in results.written] == images[:2]
    Path("empty.txt").write_text("\n")
    Path("bad.parquet").write_text("no table")
    pyarrow.parquet.write_table(pyarrow.table({"path": [1, 2]}), "numbers.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"file": ["a"]}), "other.parquet")
    for names, said in (
        (["@nowhere.txt"], "nowhere.txt: the list of images can't be read (No such file or directory)"),
        (["@in"], "in: not a regular file"),
        (["@empty.txt"], "empty.txt: the list names no images"),
        (["@bad.parquet"], "bad.parquet: not a parquet file"),
        (["@numbers.parquet"], 'has no column "path" or "image" of text'),
        (["@other.parquet"], 'has no column "path" or "image" of text'),
        (["@list.txt", "in"], "@list.txt: a list of images stands alone"),
    ):
        with pytest.raises(SystemExit):
            main(["segment", *names, "-o", "out", *asked])
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1, told
