"""Images by overlapping tiles: the cut, the blend, the strips, and going on after a stop."""

import sqlite3
from contextlib import closing
from itertools import pairwise

import numpy as np
import pytest
import torch

from opensan.assemble.calibration import Calibration
from opensan.assemble.resize import mask_bands
from opensan.jobs.strips import StripFile
from opensan.jobs.tiles import ArrayRaster, Tiling, border_weights, label_by_tiles, tile_starts
from opensan.lab.scenes import make_scene
from opensan.segmenters.san import SanSegmenter, load_san
from opensan.vocabulary import Vocabulary

WORDS = Vocabulary.parse("sky, lamp, rock, cat, sea, tree, road, car", background="river")


@pytest.fixture(scope="module")
def small(small_model):
    return SanSegmenter(small_model, text_cache=False)


@pytest.fixture(scope="module")
def picture():
    return make_scene(3, 0, (230, 300), split="test", objects=(5, 7)).image


class WithGaps(ArrayRaster):
    """All columns from 120 on have no data."""

    def read(self, top, left, height, width):
        pixels, _ = super().read(top, left, height, width)
        return pixels, np.broadcast_to(np.arange(left, left + width) < 120, (height, width))


@pytest.mark.parametrize(("length", "tile", "overlap"), [(5, 8, 2), (8, 8, 2), (9, 8, 4), (100, 8, 4), (1000, 96, 19)])
def test_tiles_cover_an_axis_and_overlap_enough(length, tile, overlap):
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] + min(tile, length) == length
    assert all(0 < b - a <= tile - overlap for a, b in pairwise(starts))
    assert len(starts) == 1 or (len(starts) - 1) * (tile - overlap) + overlap < length  # one tile fewer would not do


@pytest.mark.parametrize("overlap", [-1, 49])
def test_an_overlap_that_does_not_fit_is_refused(overlap):
    with pytest.raises(ValueError, match="choose 0 to 48"):
        Tiling.plan((200, 200), 96, overlap)


def test_weights_of_neighbours_sum_to_one_where_they_overlap():
    weights = border_weights(96, 20)
    torch.testing.assert_close(weights[-20:] + weights[:20], torch.ones(20))
    assert weights.min() > 0
    assert (weights[20:-20] == 1).all()


def test_an_image_of_one_tile_is_segmented_as_ever(small, picture):
    picture = picture[:200, :200]
    tiling = Tiling.plan(picture.shape[:2], 200)
    (labels,) = label_by_tiles(small, ArrayRaster(picture), WORDS, tiling)
    np.testing.assert_array_equal(labels, small.segment(picture, WORDS).labels)


def blended_plainly(segmenter, picture, vocabulary, tiling):
    """Scores of all words at all pixels: each tile's, weighted, added to one big array, by the sum of weights."""
    scores = torch.zeros(len(vocabulary.words), *tiling.size)
    total = torch.zeros(tiling.size)
    for top in tiling.tops:
        for left in tiling.lefts:
            window = slice(top, top + tiling.height), slice(left, left + tiling.width)
            encoding = segmenter.encode(picture[window])
            masks = mask_bands(encoding.mask_logits, encoding.sizes)(slice(tiling.height))
            weight = border_weights(tiling.height, tiling.overlap)[:, None] * border_weights(
                tiling.width, tiling.overlap
            )
            tile = torch.einsum("qk,qyx->kyx", segmenter.class_probabilities(encoding, vocabulary), masks)
            scores[:, *window] += tile * weight
            total[window] += weight
    return scores / total


def labels_of(scores, vocabulary):
    winners = scores.argmax(dim=0).numpy()
    return np.where(winners < len(vocabulary.names), winners, -1)


@pytest.mark.parametrize(("tile", "overlap"), [(96, 20), (96, 48), (128, 0), (260, 30)])
def test_the_labels_are_those_of_blended_scores(small, picture, tile, overlap):
    tiling = Tiling.plan(picture.shape[:2], tile, overlap)
    labels = np.concatenate(list(label_by_tiles(small, ArrayRaster(picture), WORDS, tiling, batch_size=2)))
    expected = labels_of(blended_plainly(small, picture, WORDS, tiling), WORDS)
    assert len(np.unique(expected)) > 1 or tiling.count == 2  # two tiles see nearly the whole, and one word
    assert (labels != expected).mean() < 1e-4  # a tie may fall either way in the last bit


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_pixels_of_less_confidence_are_unlabelled(small, picture, temperature):
    """Confidence is of the blended scores; with a calibration, the share of the word among all words."""
    tiling = Tiling.plan(picture.shape[:2], 96, 20)
    scores = blended_plainly(small, picture, WORDS, tiling)
    confidence = scores.max(dim=0).values.clamp(0, 1).numpy()
    if temperature is not None:
        confidence = (scores.log() / temperature).softmax(dim=0).max(dim=0).values.numpy()
        known = tuple(word.name for word in WORDS.words)
        small.calibrate(Calibration(str(small.identity), temperature, known, "none", 1, 1, 0.5, 0.5))
    threshold = float(np.median(confidence))
    try:
        labels = np.concatenate(list(label_by_tiles(small, ArrayRaster(picture), WORDS, tiling, threshold=threshold)))
    finally:
        small.calibration = None
    expected = np.where(confidence < threshold, -1, labels_of(scores, WORDS))
    clear = abs(confidence - threshold) > 1e-5
    assert 0.1 < (expected == -1).mean() < 0.9
    assert (labels != expected)[clear].mean() < 1e-4


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_a_threshold_that_is_no_share_is_refused(small, picture, threshold):
    tiling = Tiling.plan(picture.shape[:2], 96, 20)
    with pytest.raises(ValueError, match=r"^the threshold of confidence must be from 0 to 1"):
        next(label_by_tiles(small, ArrayRaster(picture), WORDS, tiling, threshold=threshold))


def test_going_on_from_a_strip_gives_the_same_strips(small, picture):
    tiling = Tiling.plan(picture.shape[:2], 96, 40)
    strips = list(label_by_tiles(small, ArrayRaster(picture), WORDS, tiling))
    assert len(strips) == len(tiling.strips) == 4
    for first in (1, 3):
        again = list(label_by_tiles(small, ArrayRaster(picture), WORDS, tiling, first_strip=first))
        for one, other in zip(strips[first:], again, strict=True):
            np.testing.assert_array_equal(one, other)


def test_pixels_without_data_stay_unlabelled_and_tiles_without_any_are_not_computed(small, picture, monkeypatch):
    tiling = Tiling.plan(picture.shape[:2], 96, 20)
    encoded = []
    encode = small.encode_prepared
    monkeypatch.setattr(small, "encode_prepared", lambda batch: encoded.extend(batch) or encode(batch))
    vocabulary = Vocabulary.parse("one, two, three")
    labels = np.concatenate(list(label_by_tiles(small, WithGaps(picture), vocabulary, tiling)))
    assert (labels[:, 120:] == -1).all()
    assert (labels[:, :120] >= 0).all()
    assert len(encoded) == len(tiling.tops) * sum(left < 120 for left in tiling.lefts) < tiling.count


@pytest.mark.slow
def test_seams_of_a_drawn_scene_are_hard_to_find():
    """At the borders between tiles, labels are as right as elsewhere; without overlap they are not."""
    tiny = load_san("tiny", text_cache=False)
    scene = make_scene(5, 0, (1280, 1600), split="test", objects=(12, 18), radius=(0.06, 0.1))
    words = Vocabulary.parse(list(dict.fromkeys(region.name for region in scene.regions)))
    changes = {}
    for overlap in (0, 96):
        tiling = Tiling.plan(scene.image.shape[:2], 480, overlap)
        labels = np.concatenate(list(label_by_tiles(tiny, ArrayRaster(scene.image), words, tiling)))
        across = (labels[:, 1:] != labels[:, :-1]).mean(axis=0)
        seams = [left - 1 for left in tiling.lefts[1:]]
        changes[overlap] = across[seams].mean() / np.median(across)
    assert changes[96] < 2 < changes[0]


# ------------------------------------------------------------------------------------------------- unfinished work


STRIPS = [(0, 3), (3, 5), (5, 9)]


def strip(number, words=5):
    top, bottom = STRIPS[number]
    return np.random.default_rng(number).integers(-1, words, (bottom - top, 4), dtype=np.int32)


@pytest.mark.parametrize("words", [5, 255, 256])
def test_strips_come_back_as_written(tmp_path, words):
    with StripFile(tmp_path / "part", {"words": words}, STRIPS, 4) as file:
        for number in range(3):
            file.append(strip(number, words))
        rows = file.rows(0, 9).astype(np.int32)
    rows[rows == np.iinfo(file.dtype).max] = -1
    np.testing.assert_array_equal(rows, np.concatenate([strip(number, words) for number in range(3)]))
    assert not (tmp_path / "part.lock").exists()


def test_a_strip_that_was_cut_short_is_written_again(tmp_path):
    path = tmp_path / "part"
    with StripFile(path, {"words": 5}, STRIPS, 4) as file:
        file.append(strip(0))
        file.append(strip(1))
    with closing(sqlite3.connect(path)) as rows, rows:
        rows.execute("DELETE FROM done WHERE key = '1'")
    with StripFile(path, {"words": 5}, STRIPS, 4) as file:
        assert file.finished == 1 and file.other_work is None
        file.append(strip(1))
        np.testing.assert_array_equal(file.rows(2, 5), np.concatenate([strip(0), strip(1)])[2:].astype(np.uint8))
    path.write_bytes(path.read_bytes()[:-3])
    with StripFile(path, {"words": 5}, STRIPS, 4) as file:
        assert file.finished == 0  # damaged: nothing of it is believed
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["part"]


def test_other_work_is_begun_anew(tmp_path):
    path = tmp_path / "part"
    with StripFile(path, {"words": 5, "model": "a"}, STRIPS, 4) as file:
        file.append(strip(0))
    with StripFile(path, {"words": 5, "model": "b"}, STRIPS, 4) as file:
        assert file.finished == 0 and file.other_work == "another model"
        file.append(strip(0))
    path.write_bytes(b"garbage\n" * 50 + path.read_bytes())
    with StripFile(path, {"words": 5, "model": "b"}, STRIPS, 4) as file:
        assert file.finished == 0
        file.append(strip(0))


def test_two_runs_do_not_write_the_same_file(tmp_path):
    with (
        StripFile(tmp_path / "part", {"words": 5}, STRIPS, 4),
        pytest.raises(ValueError, match="another run is writing"),
        StripFile(tmp_path / "part", {"words": 5}, STRIPS, 4),
    ):
        pass
