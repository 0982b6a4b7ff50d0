"""`opensan.Labeller` as the function of `map`, by the library `datasets` itself."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import opensan
from opensan.checkpoints import save_folder
from opensan.errors import UserError
from opensan.files import ASSETS

datasets = pytest.importorskip("datasets", reason="the library `datasets` is not installed")

WORDS = "grass, night sky, green square, brick, green heart, orange square"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def san():
    return opensan.load("tiny", text_cache=False)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    made = []
    for name, size in (("playground", (160, 120)), ("court", (160, 120)), ("workshop", (120, 90))):
        with Image.open(ASSETS / "scenes" / f"{name}.png") as scene:
            made.append(scene.convert("RGB").resize(size))
    return made


@pytest.fixture
def dataset(pictures):
    return datasets.Dataset.from_dict({"image": pictures}).cast_column("image", datasets.Image())


@pytest.fixture(scope="module")
def expected(san, pictures) -> list[np.ndarray]:
    return [answer.labels for answer in san.segment(pictures, WORDS)]


def as_labels(picture: Image.Image) -> np.ndarray:
    labels = np.asarray(picture).astype(int)
    return np.where(labels == 255, -1, labels)


def test_map_adds_pictures_that_are_stored_as_png(san, dataset, expected):
    label = opensan.Labeller(WORDS, model=san)
    labelled = dataset.map(label, batched=True, batch_size=2)
    assert labelled.features["labels"] == datasets.Image()
    for row, labels in zip(labelled, expected, strict=True):
        np.testing.assert_array_equal(as_labels(row["labels"]), labels)
    stored = labelled.cast_column("labels", datasets.Image(decode=False))[0]["labels"]["bytes"]
    with Image.open(io.BytesIO(stored)) as picture:
        assert (picture.format, picture.mode) == ("PNG", "P")
    assert label.id2label == dict(enumerate(WORDS.split(", "))) and len(np.unique(expected[0])) > 1


def test_it_makes_arrays_and_takes_single_rows(san, dataset, expected):
    label = opensan.Labeller(WORDS, model=san, labels="words", arrays=True)
    labelled = dataset.map(label).with_format("numpy")
    for row, labels in zip(labelled, expected, strict=True):
        np.testing.assert_array_equal(row["words"], labels)


@pytest.mark.parametrize("form", ["numpy", "torch", "encoded", "file"])
def test_it_takes_images_in_every_form_of_datasets(san, dataset, expected, form, tmp_path):
    if form in ("numpy", "torch"):
        dataset = dataset.with_format(form)
    elif form == "encoded":
        dataset = dataset.cast_column("image", datasets.Image(decode=False))
    else:
        paths = [str(tmp_path / f"{number}.png") for number in range(3)]
        for path, picture in zip(paths, dataset["image"], strict=True):
            picture.save(path)
        dataset = datasets.Dataset.from_dict({"image": paths})
    # One size alone is one array; several are a list.
    for rows in ([0, 1], [0, 1, 2]):
        labelled = dataset.select(rows).map(opensan.Labeller(WORDS, model=san), batched=True).with_format(None)
        for row, index in zip(labelled, rows, strict=True):
            np.testing.assert_array_equal(as_labels(row["labels"]), expected[index])


def test_a_row_without_image_gets_no_labels(san, pictures):
    dataset = datasets.Dataset.from_dict({"image": [pictures[0], None]}).cast_column("image", datasets.Image())
    labelled = dataset.map(opensan.Labeller(WORDS, model=san), batched=True)
    assert labelled[0]["labels"] is not None and labelled[1]["labels"] is None


def test_the_rest_is_unlabelled(san, dataset):
    label = opensan.Labeller("green heart", model=san, rest=True)
    labels = as_labels(dataset.map(label, batched=True)[0]["labels"])
    np.testing.assert_array_equal(labels, san.segment(dataset[0]["image"], "green heart", rest=True).labels)
    assert (labels == -1).any()


def test_the_fingerprint_is_that_of_the_words_and_the_weights(san, tmp_path):
    """Of two models with the same weights it is the same, also in another process."""
    digest = datasets.fingerprint.Hasher.hash
    first = digest(opensan.Labeller(WORDS, model=san))
    assert first == digest(opensan.Labeller(WORDS, model=opensan.load("tiny", text_cache=False)))
    other_weights = opensan.load("tiny", random_weights=1, text_cache=False)
    others = [
        opensan.Labeller(WORDS.replace("brick", "sand"), model=san),
        opensan.Labeller(WORDS, model=san, threshold=0.5),
        opensan.Labeller(WORDS, model=san, rest=True),
        opensan.Labeller(WORDS, model=san, arrays=True),
        opensan.Labeller(WORDS, model=other_weights),
    ]
    assert len({first, *map(digest, others)}) == 1 + len(others)
    code = (
        "import opensan, datasets; san = opensan.load('tiny', text_cache=False); "
        f"print(datasets.fingerprint.Hasher.hash(opensan.Labeller({WORDS!r}, model=san)))"
    )
    assert run(code, tmp_path).strip() == first


def run(code: str, home: Path, **more: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(opensan.__file__).parents[1]), "HF_HOME": str(home), **more}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_was_computed_is_found_again(san, dataset, tmp_path, monkeypatch):
    dataset.save_to_disk(tmp_path / "saved")
    datasets.load_from_disk(tmp_path / "saved").map(opensan.Labeller(WORDS, model=san), batched=True)
    monkeypatch.setattr(opensan.Labeller, "__call__", lambda *_: pytest.fail("computed again"))
    again = datasets.load_from_disk(tmp_path / "saved").map(opensan.Labeller(WORDS, model=san), batched=True)
    assert again[0]["labels"].size == (160, 120)


def test_other_processes_load_the_model_by_its_name(tmp_path, pictures, expected):
    """Also where this process has computed with several threads, which a fork loses."""
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    code = f"""
import numpy as np, opensan, datasets
paths = [{str(tmp_path)!r} + f"/{{number}}.png" for number in range(3)]
label = opensan.Labeller({WORDS!r}, model="tiny")
label({{"image": paths}})
labelled = datasets.Dataset.from_dict({{"image": paths}}).map(label, batched=True, batch_size=1, num_proc=3)
print([np.bincount(np.asarray(row["labels"]).ravel(), minlength=7).tolist() for row in labelled])
"""
    counts = [np.bincount(labels.ravel(), minlength=7).tolist() for labels in expected]
    assert run(code, tmp_path, OMP_NUM_THREADS="2").strip().endswith(str(counts))


def test_a_loaded_model_does_not_travel_and_the_error_says_what_to_do(san, pictures):
    copy = pickle.loads(pickle.dumps(opensan.Labeller(WORDS, model=san)))
    assert copy.names == WORDS.split(", ")
    with pytest.raises(UserError, match=r"give Labeller the model's name or path"):
        copy({"image": pictures})


def test_a_model_that_changed_is_noticed(fresh_model, pictures, tmp_path):
    model = fresh_model()
    label = opensan.Labeller("road, sky", model=save_folder(model, tmp_path / "model"))
    copy = pickle.loads(pickle.dumps(label))
    assert copy({"image": pictures[:1]})["labels"][0].size == pictures[0].size
    with torch.no_grad():
        next(model.parameters()).add_(1)
    save_folder(model, tmp_path / "model")
    with pytest.raises(UserError, match="has changed since this Labeller was made"):
        pickle.loads(pickle.dumps(label))({"image": pictures})


def test_a_missing_column_is_named(san):
    with pytest.raises(UserError, match=r"no column 'image': the columns are 'photo', 'id'"):
        opensan.Labeller(WORDS, model=san)({"photo": [], "id": []})
