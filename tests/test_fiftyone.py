"""Labels in FiftyOne: the real library's classes, and, where its database runs, a data set out and in again.

Where FiftyOne finds no database, FIFTYONE_DATABASE_URI names one (mongodb://127.0.0.1:27017).
"""

import sys

import numpy as np
import pytest
from PIL import Image

import opensan
from opensan.cli import main
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.errors import UserError
from opensan.files import ASSETS
from opensan.segmenters.fiftyone_labels import fiftyone_segmentation, mask_targets

WORDS = ["night sky", "brick", "green heart"]
SCENE = ASSETS / "scenes" / "playground.png"


@pytest.fixture(scope="module")
def found():
    return opensan.load("tiny", text_cache=False).segment(SCENE, WORDS, rest=True)


@pytest.fixture(scope="module")
def fo():
    return pytest.importorskip("fiftyone")


@pytest.fixture
def dataset(fo):
    """A data set in FiftyOne's database."""
    try:
        dataset = fo.Dataset()
    except Exception as error:  # no database program, or none that starts
        pytest.skip(f"FiftyOne has no database here ({type(error).__name__})")
    yield dataset
    dataset.delete()


def test_without_the_library(found, monkeypatch):
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    assert found.mask_targets == {1: "night sky", 2: "brick", 3: "green heart"}
    for segments in (False, True):
        with pytest.raises(UserError, match="pip install fiftyone"):
            found.to_fiftyone(segments)


def test_more_words_than_a_mask_has_values():
    with pytest.raises(UserError, match="65,535 values"):
        fiftyone_segmentation(np.zeros((2, 2), np.int32), 65_536)


def test_a_label_map(fo, found):
    label = found.to_fiftyone()
    assert isinstance(label, fo.Segmentation) and label.mask.dtype == np.uint8
    np.testing.assert_array_equal(label.mask.astype(int) - 1, found.labels)
    assert (label.mask == 0).any() and label.mask.max() <= 3
    many = np.arange(300, dtype=np.int32).reshape(20, 15) - 1
    wide = fiftyone_segmentation(many, 299)
    assert wide.mask.dtype == np.uint16 and (wide.mask == many + 1).all() and len(mask_targets(["a"] * 299)) == 299


def test_objects(fo, found):
    label = found.to_fiftyone(segments=True)
    assert isinstance(label, fo.Detections) and len(label.detections) == len(found.segments) > 0
    height, width = found.labels.shape
    for one, segment in zip(label.detections, found.segments, strict=True):
        assert (one.label, one.kind, one.segment) == (segment.word, segment.kind, segment.id)
        assert one.confidence == pytest.approx(segment.score)
        mask = one.to_segmentation(frame_size=(width, height), target=1).mask > 0  # as FiftyOne reads it
        np.testing.assert_array_equal(mask, segment.mask)


def test_a_data_set_out_and_in(fo, dataset, found, tmp_path):
    """Predictions survive the database; what people corrected there is prepared for training by a command."""
    sample = fo.Sample(filepath=str(SCENE))
    sample["words"] = found.to_fiftyone()
    sample["objects"] = found.to_fiftyone(segments=True)
    dataset.add_sample(sample)
    dataset.default_mask_targets = found.mask_targets
    dataset.save()
    stored = dataset.first()
    np.testing.assert_array_equal(stored.words.mask.astype(int) - 1, found.labels)
    assert dataset.count_values("objects.detections.label") == {
        word: len(found.segments.of(word)) for word in WORDS if found.segments.of(word)
    }
    corrected = stored.words.mask.copy()
    corrected[:20] = 2
    stored.words.mask = corrected
    stored.save()

    export = tmp_path / "export"
    dataset.export(
        export_dir=str(export), dataset_type=fo.types.ImageSegmentationDirectory, label_field="words", progress=False
    )
    (export / "data").rename(export / "images")
    (export / "classes.txt").write_text("".join(f"{value}: {name}\n" for value, name in found.mask_targets.items()))
    source, out = ["--source", str(export)], ["--out", str(tmp_path / "prepared")]
    with pytest.raises(SystemExit) as end:
        main(["data", "prepare", "folder", "unlabelled=0", *source, *out])
    assert not end.value.code
    [(image, labels)] = list(SegmentationFolder(tmp_path / "prepared", "all"))
    np.testing.assert_array_equal(labels, corrected.astype(int) - 1)
    np.testing.assert_array_equal(image, np.asarray(Image.open(SCENE).convert("RGB")))
