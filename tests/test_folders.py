"""Whole folders: what is done once is not done again, whatever happened in between."""

import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

import opensan
from opensan.images import list_images
from opensan.jobs.folder import Broken, FolderRun, Written, plan, without_results
from opensan.outputs import DATASETS, FORMATS
from opensan.vocabulary import Vocabulary

ALL = (*FORMATS, *DATASETS)
WORDS = "road, car|automobile, sky"
BOOKS = ("manifest.jsonl", ".opensan.lock")


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
    written = [result.job.place for result in results if isinstance(result, Written)]
    return written, [result.reason for result in results if isinstance(result, Broken)], run.notes


def contents(out: Path) -> dict[str, bytes]:
    """Of all files but those that say when and where."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name not in (*BOOKS, "data.yaml"))
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def records(out: Path) -> list[dict]:
    """The manifest's whole lines about photographs."""
    lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True) if (out / "manifest.jsonl").exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n") and '"place"' in line]


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
    segmenter.fingerprint = "another"
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


def test_nothing_in_a_manifest_is_believed(segmenter, tmp_path):
    folder, out = photographs(tmp_path / "in", 2), tmp_path / "out"
    run_folder(segmenter, folder, out)
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    text = (out / "manifest.jsonl").read_text()
    for bad in (
        text.replace("0/000.labels.png", "../mine.txt"),
        text.replace("0/000.labels.png", str(mine)),
        "[1, 2]\n" + text.replace('"source": [', '"source": ["x", '),
        text[: len(text) // 2],
        "\0\n{}\n",
    ):
        (out / "manifest.jsonl").write_text(bad)
        written, _, _ = run_folder(segmenter, folder, out)
        assert written and mine.read_text() == "mine"
        assert sorted(record["place"] for record in records(out)) == ["0/000", "1/001"]


def test_two_runs_do_not_share_a_folder(segmenter, tmp_path):
    folder, out = photographs(tmp_path / "in", 1), tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".opensan.lock"), pytest.raises(ValueError, match="another run is writing there"):
        run_folder(segmenter, folder, out)
    assert run_folder(segmenter, folder, out)[0] == ["0/000"]


def test_left_over_files_go_and_others_stay(segmenter, tmp_path):
    folder, out = photographs(tmp_path / "in", 1), tmp_path / "out"
    left = ["0/.000.labels.abcd_123.part.png", "voc/JPEGImages/0/.000.png.part", "voc/.labelmap.abcdefgh.part.txt"]
    left += ["0/.opensan.abcd_123.part", ".opensan.abcd_123.part"]
    others = ["0/.other.labels.abcd_123.part.png", "0/.000.labels.part.png", "0/000.labels.abcd_123.part.png"]
    for name in (*left, *others):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("x")
    run_folder(segmenter, folder, out, ["png", "voc"])
    assert [name for name in (*left, *others) if (out / name).exists()] == others


def test_a_folder_that_can_not_be_written(segmenter, tmp_path):
    folder = photographs(tmp_path / "in", 3)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "1").write_text("in the way")
    with pytest.raises(ValueError, match="cannot write there") as caught:
        run_folder(segmenter, folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [record["place"] for record in records(tmp_path / "out")] == ["0/000"]


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
