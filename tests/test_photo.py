"""The model of photographs that comes with the package, and the photographs to try it on."""

import numpy as np
import pytest
from PIL import Image

import opensan
from opensan.checkpoints.hub import BUNDLED, model_on_disk
from opensan.checkpoints.presets import PRESETS
from opensan.cli.demo import PHOTOGRAPHS, WORDS


@pytest.fixture(scope="module")
def photo():
    return opensan.load("photo", text_cache=False)


def test_it_is_small_and_its_licence_comes_along():
    assert sum(file.stat().st_size for file in BUNDLED["photo"].iterdir()) <= 32_000_000
    assert "Apache License" in (BUNDLED["photo"] / "LICENSE-APACHE.txt").read_text()
    told = (PHOTOGRAPHS / "ATTRIBUTION.md").read_text()
    for name in WORDS:
        assert f"{name}.jpg" in told
        assert Image.open(PHOTOGRAPHS / f"{name}.jpg").size <= (640, 640)


def test_it_finds_the_sky_the_road_and_the_cyclist(photo):
    labels = photo.segment(PHOTOGRAPHS / "street.jpg", "sky, road, bicycle").labels
    height, width = labels.shape
    assert (labels[: height // 4, width // 3 : width // 2] == 0).mean() > 0.95
    assert (labels[-height // 8 :, : width // 3] == 1).mean() > 0.95
    rows, columns = np.nonzero(labels == 2)
    assert 0.5 < columns.mean() / width < 0.85 and 0.45 < rows.mean() / height < 0.95


def test_other_words_are_asked_of_the_same_image(photo):
    segmentation = photo.segment(PHOTOGRAPHS / "animal.jpg", "ocean, horse")
    assert 0.03 < segmentation.mask("horse").mean() < 0.2
    again = segmentation.relabel("sand, water, horse")
    np.testing.assert_array_equal(again.labels, photo.segment(PHOTOGRAPHS / "animal.jpg", "sand, water, horse").labels)


@pytest.mark.parametrize("name", WORDS)
def test_demo_needs_no_network(run, tmp_path, name):
    code, stdout, stderr = run("demo", name, "--out", tmp_path)
    assert code == 0 and not stderr
    assert str(tmp_path / f"{name}.overlay.png") in stdout.replace("\n", "")
    assert (tmp_path / f"{name}.overlay.png").stat().st_size > 10_000


def test_the_page_takes_official_weights_that_are_on_disk_and_photo_otherwise(monkeypatch, tmp_path):
    cached = {}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _repository, file: cached.get(file))
    assert model_on_disk() == "photo"
    cached[PRESETS["san-vit-l14"].official.file] = str(tmp_path)
    assert model_on_disk() == "san-vit-l14"
    cached[PRESETS["san-vit-b16"].official.file] = str(tmp_path)
    assert model_on_disk() == "san-vit-b16"
