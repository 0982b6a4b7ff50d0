"""Streams: a line of JSON in, a line of JSON out."""

import base64
import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import opensan
from opensan.errors import UserError
from opensan.jobs import lines
from opensan.jobs.lines import LineQuestion, answers
from opensan.outputs import read_label_map
from opensan.outputs.coco import decode_mask
from opensan.vocabulary import Vocabulary

from .test_folders import photographs, run_folder

WORDS = "road, car|automobile, sky"


@pytest.fixture
def segmenter(model_folder):
    return opensan.load(model_folder)


@pytest.fixture
def images(tmp_path) -> list[Path]:
    return sorted(photographs(tmp_path / "in", 5).rglob("*.png"))


def question(out: Path, *formats: str, words: str | None = WORDS) -> LineQuestion:
    return LineQuestion(Vocabulary.parse, words and Vocabulary.parse(words), out, formats)


def stream(*asked: object) -> io.BytesIO:
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in asked]
    return io.BytesIO(b"".join(text + b"\n" for text in texts))


def ask(segmenter, out: Path, *asked: object, formats=("rle",), words: str | None = WORDS, batch=1) -> list[dict]:
    return list(answers(segmenter, question(out, *formats, words=words), stream(*asked), batch=batch))


@pytest.mark.parametrize("batch", [1, 3])
def test_answers_are_those_of_segment_in_order(segmenter, images, tmp_path, batch):
    asked = [{"image": str(image), "id": number} for number, image in enumerate(images)]
    formats = ("rle", "png")
    found = ask(segmenter, tmp_path / "out", *asked, formats=formats, batch=batch)
    assert [(line["line"], line["id"], line["image"]) for line in found] == [
        (number + 1, number, str(image)) for number, image in enumerate(images)
    ]
    for line, image in zip(found, images, strict=True):
        segmentation = segmenter.segment(image, WORDS)
        assert line["areas"] == segmentation.areas and line["unlabelled"] == 0
        (file,) = line["files"]
        assert np.array_equal(read_label_map(file), segmentation.labels)
        assert {mask["name"] for mask in line["masks"]} == {name for name, area in line["areas"].items() if area}
        for mask in line["masks"]:
            decoded = decode_mask(mask["rle"], *segmentation.labels.shape)
            assert np.array_equal(decoded, segmentation.labels == mask["index"])


def test_a_line_may_bring_the_image_and_words(segmenter, images, tmp_path):
    content = base64.b64encode(images[0].read_bytes()).decode()
    own = {"words": ["tree", "sea"], "background": ["road"]}
    first, second, third, fourth = ask(
        segmenter,
        tmp_path / "out",
        {"image": f"data:image/png;base64,{content}", "words": own},
        {"image": str(images[0]), "words": "tree, sea"},
        {"image": str(images[0])},
        {"image": str(images[0]), "words": "tree, tree"},
        words=None,
    )
    assert first["areas"] == segmenter.segment(images[0], "tree, sea", background="road").areas
    assert "image" not in first and list(second["areas"]) == ["tree", "sea"]
    assert third["error"] == "neither the line nor the command has words"
    assert "repeats" in fourth["error"]
    assert not (tmp_path / "out").exists()


BAD = [
    (b"{", "not JSON: '{'"),
    (b"\xff\xfe", "not JSON"),
    (b"", "the line is blank"),
    (b"[" * 100_000, "not JSON"),
    (["a.png"], "a line is an object"),
    ({}, '"image" is a path'),
    ({"image": ""}, '"image" is a path'),
    ({"image": 3}, '"image" is a path'),
    ({"image": "nowhere.png"}, "nowhere.png: can't be read (No such file or directory)"),
    ({"image": "a\0b"}, "not a file name"),
    ({"image": "."}, "not a regular file"),
    ({"image": "http://localhost/a.png"}, "URLs are not fetched"),
    ({"image": "data:image/png;base64,###"}, "not valid base64"),
    ({"image": "data:;base64,AAAA"}, "image bytes: not an image"),
    ({"image": "a.png", "id": 1.5}, '"id" is text or a whole number'),
    ({"image": "a.png", "id": True}, '"id" is text or a whole number'),
    ({"image": "a.png", "ids": 1}, "unknown key 'ids'"),
    ({"image": "a.png", "words": 3}, "words must be a string or a list"),
]


@pytest.mark.parametrize("batch", [1, 4])
def test_a_bad_line_is_answered_and_the_stream_goes_on(segmenter, images, tmp_path, monkeypatch, batch):
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(images[0].read_bytes())
    asked = [line for bad, _ in BAD for line in (bad, {"image": "a.png", "id": "good"})]
    found = ask(segmenter, tmp_path / "out", *asked, batch=batch)
    assert len(found) == 2 * len(BAD)
    for line, (_, said) in zip(found[::2], BAD, strict=True):
        assert said in line["error"] and "\n" not in line["error"] and "areas" not in line
    assert all(line["id"] == "good" and "areas" in line for line in found[1::2])


def test_ids_name_files_and_nothing_else(segmenter, images, tmp_path):
    bad = [None, "", "..", "a/b", "../a", "/etc/a", "a\nb", "a\0", "\ud800", "x" * 300]
    asked = [{"image": str(images[0])} | ({} if given is None else {"id": given}) for given in bad]
    found = ask(segmenter, tmp_path / "deep" / "out", *asked, {"image": str(images[0]), "id": 7}, formats=("png",))
    assert all("error" in line for line in found[:-1]), found
    assert found[-1]["files"] == [str(tmp_path / "deep" / "out" / "7.labels.png")]
    files = [path.name for path in (tmp_path / "deep").rglob("*") if path.is_file()]
    assert files == ["7.labels.png"]


def test_the_results_of_a_folder_are_not_replaced_by_a_stream(segmenter, images, tmp_path):
    run_folder(segmenter, tmp_path / "in", tmp_path / "out")
    with pytest.raises(UserError, match="a folder's run"):
        ask(segmenter, tmp_path / "out", {"image": str(images[0]), "id": 1}, formats=("png",))


def test_a_line_that_is_too_long_is_passed_over(segmenter, images, tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LONGEST_LINE", 1000)
    found = ask(segmenter, tmp_path, b" " * 5000, {"image": str(images[0])}, b"x" * 1000)
    assert ["error" in line for line in found] == [True, False, True]
    assert "longer than 1,000 bytes" in found[0]["error"]


def test_a_full_disk_ends_the_stream(segmenter, images, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    asked = [{"image": str(images[0]), "id": number} for number in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left"):
            ask(segmenter, tmp_path / "out", *asked, formats=("png",))
    assert len(ask(segmenter, tmp_path / "out", *asked, formats=("png",))) == 3


def test_a_fault_while_reading_is_told(segmenter, images, tmp_path, monkeypatch):
    monkeypatch.setattr(segmenter, "read", lambda image: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ask(segmenter, tmp_path, {"image": str(images[0])})


def test_the_reader_stops_when_nobody_asks_for_answers(segmenter, images, tmp_path):
    found = answers(segmenter, question(tmp_path, "rle"), stream(*[{"image": str(images[0])}] * 50))
    next(found)
    found.close()
    for thread in threading.enumerate():
        if thread.name == "lines":
            thread.join(30)
            assert not thread.is_alive()


def start(model_folder, *options: str) -> subprocess.Popen:
    source = str(Path(opensan.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-m", "opensan", "segment", "-", "--lines", "-m", str(model_folder), "-w", WORDS, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # some shells' jobs ignore it
    )


def test_each_answer_comes_before_the_next_line_and_a_closed_pipe_ends_quietly(model_folder, images):
    with start(model_folder, "--batch", "4") as process:
        for image in images[:3]:
            process.stdin.write(json.dumps({"image": str(image), "id": image.stem}) + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["id"] == image.stem
        process.stdout.close()
        process.stdin.write(json.dumps({"image": str(images[0])}) + "\n")
        process.stdin.flush()  # and stdin stays open
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


def test_ctrl_c_ends_it(model_folder, images):
    with start(model_folder) as process:
        process.stdin.write(json.dumps({"image": str(images[0])}) + "\n")
        process.stdin.flush()
        assert "areas" in json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == "interrupted\n"


def test_the_command(model_folder, images, tmp_path, run, monkeypatch):
    def ask(*options: object, asked: tuple = ({"image": str(images[0]), "id": "a"}, b"x")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream(*asked)))
        code, out, err = run("segment", "-", "--lines", "-m", model_folder, "-o", tmp_path / "out", *options)
        return code, [json.loads(line) for line in out.splitlines()], err

    code, (first, second), err = ask("-w", WORDS)
    assert (code, err) == (0, "") and first["masks"] and first["files"] == [] and "error" in second
    code, (first, _), err = ask("-w", WORDS, "--format", "json,overlay")
    assert (code, err) == (0, "") and "masks" not in first
    assert sorted(map(os.path.basename, first["files"])) == ["a.overlay.png", "a.segments.json"]
    code, (first, _), err = ask("-w", WORDS, "--threshold", "1")
    assert code == 0 and first["unlabelled"] == 1
    code, (first, _), err = ask(
        *("--background", "sky", "--rest", "--stuff", "sea", "--format", "rle,boxes"),
        asked=({"image": str(images[0]), "id": "b", "words": "sea, sky lantern"}, {"image": "x", "id": 1}),
    )
    assert (code, err) == (0, "") and list(first["areas"]) == ["sea", "sky lantern"]
    boxes = json.loads((tmp_path / "out" / "b.boxes.json").read_text())
    assert boxes["words"]["sea"]["kind"] == "stuff"
    for options, said in (
        (("--format", "coco"), "coco is a data set of all images"),
        (("--format", "gif"), "unknown output format 'gif': choose from rle, png"),
        (("--format", ","), "none: choose from rle, png"),
        (("--show",), "neither --show nor --explain"),
        ((images[0],), "give - in place of images"),
    ):
        code, found, err = ask("-w", WORDS, *options)
        assert code == 2 and not found and said in err, (options, err)
