"""Whole runs from Python: `opensan.label_folder`, `opensan.label_video` and `opensan.evaluate`."""

import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

import opensan
from opensan.errors import UserError

from .test_evaluate import make_folder

WORDS = "road, car, sky"


def photograph(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(values).resize((80, 60)).save(path)
    return path


def test_a_folder_is_labelled_as_the_command_does_it(tmp_path, model_folder, run):
    for number, name in enumerate(("a.png", "deep/b.png")):
        photograph(tmp_path / "photos" / name, number)
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    reports = []
    with pytest.warns(UserWarning, match="1 of 3 images are not done, the first: .*broken.jpg"):
        results = opensan.label_folder(
            tmp_path / "photos",
            WORDS,
            model=model_folder,
            out=tmp_path / "out",
            progress=lambda *report: reports.append(report),
        )
    assert reports == [(1, 3), (2, 3), (3, 3)]
    assert [item.job.stem for item in results.written] == ["a", "deep/b"] and len(results.broken) == 1
    assert results.written[0].areas.keys() == {"road", "car", "sky"}
    code, _, _ = run(*("segment", tmp_path / "photos", "-w", WORDS, "-m", model_folder, "-o", tmp_path / "command"))
    assert code == 1  # the broken one
    for name in ("a.labels.png", "deep/b.segments.json", "deep/b.overlay.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "command" / name).read_bytes()
    segmenter = opensan.load(model_folder)
    with pytest.warns(UserWarning):
        again = opensan.label_folder(tmp_path / "photos", WORDS, model=segmenter, out=tmp_path / "out")
    assert (again.written, again.earlier) == ([], 2)


def test_a_data_set_of_labels_does_not_go_where_the_images_are(tmp_path, model_folder):
    photograph(tmp_path / "a.png")
    with pytest.raises(UserError, match="coco links to the images"):
        opensan.label_folder(tmp_path, WORDS, model=model_folder, out=tmp_path, formats=["coco"])


@pytest.mark.skipif(find_spec("av") is None, reason="videos need PyAV (the extra `video`)")
def test_a_video_is_labelled(tmp_path, model_folder):
    from .test_video import write_clip

    write_clip(tmp_path / "street.mp4")
    reports = []
    results = opensan.label_video(
        tmp_path / "street.mp4",
        WORDS,
        model=model_folder,
        out=tmp_path / "out",
        every=2,
        progress=lambda *report: reports.append(report),
    )
    assert reports[-1][0] == results.frames == len(list(results.labels.iterdir())) > 1
    rows = [line.split(",") for line in results.table.read_text().splitlines()]
    means = np.array([row[2:5] for row in rows[1:]], float).mean(axis=0)
    np.testing.assert_allclose(list(results.areas.values()), means, atol=1e-4)
    assert results.overlay.stat().st_size


def test_an_evaluation_writes_what_the_command_writes(tmp_path, model_folder, run):
    data_folder = make_folder(tmp_path / "shore")
    found = opensan.evaluate(data_folder, model_folder, out=tmp_path / "out")
    code, _, _ = run("eval", "--data", data_folder, "-m", model_folder, "-o", tmp_path / "command")
    assert code == 0
    metrics = [tmp_path / name / data_folder.name / "metrics.json" for name in ("out", "command")]
    ours, theirs = (json.loads(path.read_text()) for path in metrics)
    assert ours == theirs and ours["metrics"]["miou"] == found.metrics.miou
    assert (tmp_path / "out" / data_folder.name / "index.html").exists()
    loaded = opensan.evaluate(data_folder, opensan.load(model_folder), out=tmp_path / "loaded", tta=True)
    assert loaded.images == found.images
    with pytest.raises(UserError, match="has no list mine"):
        opensan.evaluate(data_folder, model_folder, out=tmp_path / "none", split="mine")


def test_the_functions_are_there_before_torch_is(tmp_path):
    code = "import sys, opensan; names = dir(opensan); assert 'torch' not in sys.modules; print(*names)"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"evaluate", "label_folder", "label_video"} <= set(names)
