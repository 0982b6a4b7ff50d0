"""Words with equal embeddings: the first of them gets the pixel, whatever the batch, the threads, or the way there."""

import numpy as np
import pytest
import torch
from PIL import Image

import opensan
from opensan.assemble.bands import best_words, first_equal
from opensan.evaluation.predictors import AugmentedPredictor
from opensan.export import export
from opensan.files import ASSETS
from opensan.jobs.tiles import ArrayRaster, Tiling, label_by_tiles
from opensan.text.rows import with_equal_rows
from opensan.vocabulary import Vocabulary

UNSEEN = ["road", "wall", "table"]
"""Words that the packaged model has never seen: their text embeddings are equal."""
VOCABULARIES = [
    ["wall", "sky", "road"],
    ["brick|wall", "sky", "road"],
    ["road", "sky", "brick|wall", "grass|table"],
    ["brick", "sky", "grass", *UNSEEN],
]

pytestmark = pytest.mark.filterwarnings("ignore:the model has never seen")


@pytest.fixture(scope="module")
def tiny():
    return opensan.load("tiny", text_cache=False)


@pytest.fixture(scope="module")
def pictures():
    cut = []
    for number, path in enumerate(sorted((ASSETS / "scenes").glob("*.png"))[:3]):
        with Image.open(path) as picture:
            left, top = (number * 97) % (picture.width - 160), (number * 61) % (picture.height - 120)
            cut += [np.array(picture.convert("RGB").crop((x, top, x + 160, top + 120))) for x in (left, left // 2)]
    return cut


def possible_labels(words) -> set[int]:
    """Leave out the words that never score higher than an earlier one: all that they have, that one has too."""
    unseen = [index for index, word in enumerate(words) if set(word.split("|")) & set(UNSEEN)]
    return {index for index, word in enumerate(words) if word not in UNSEEN or index == unseen[0]}


def test_equal_rows_have_one_first():
    rows = np.array([[1, 2], [3, 4], [1, 2], [3, 4], [5, 6]], np.float32)
    assert first_equal(rows).tolist() == [0, 1, 0, 1, 4]


def test_rows_that_are_equal_up_to_rounding_become_equal():
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((500, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[100::2] = rows[7] + generator.uniform(-5e-7, 5e-7, (200, 64)).astype(np.float32)
    rows[101] = rows[8] + np.float32(1e-4)  # another word
    found = with_equal_rows(rows)
    np.testing.assert_array_equal(found[100::2], np.broadcast_to(rows[7], (200, 64)))
    others = [*range(100), *range(101, 500, 2)]
    np.testing.assert_array_equal(found[others], rows[others])


@pytest.mark.parametrize("words", VOCABULARIES, ids=",".join)
def test_equal_words_have_exactly_equal_probabilities_and_scores(tiny, pictures, words):
    """Whatever the words' number and places are: a matrix product may round each column in its own way."""
    encoding = tiny.encode(pictures[0])
    for more in range(0, 40, 7):
        vocabulary = Vocabulary.parse(words + Vocabulary.ready("ade20k_847").names[100 : 100 + more])
        alone = [index for index, word in enumerate(vocabulary.names) if word in UNSEEN]
        probabilities = tiny.class_probabilities(encoding, vocabulary)[:, alone]
        assert torch.equal(probabilities, probabilities[:, :1].expand_as(probabilities))
        scores = tiny.scores(encoding, vocabulary)(slice(30, 40))[alone]
        assert torch.equal(scores, scores[:1].expand_as(scores))


@pytest.mark.parametrize("words", VOCABULARIES, ids=",".join)
def test_a_tie_is_decided_alike_in_any_batch_and_with_any_number_of_threads(tiny, pictures, words):
    allowed = possible_labels(words)
    before = torch.get_num_threads()
    expected = [segmentation.labels for segmentation in tiny.segment(pictures, words, batch_size=1)]
    try:
        for batch, threads in ((2, 1), (3, 2), (6, 1)):
            torch.set_num_threads(threads)
            for one, found in zip(expected, tiny.segment(pictures, words, batch_size=batch), strict=True):
                assert set(np.unique(found.labels)) <= allowed
                assert (one != found.labels).mean() < 1e-3  # the last bits of an encoding may move a border
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("words", VOCABULARIES, ids=",".join)
def test_every_path_decides_alike(tiny, pictures, words):
    vocabulary = Vocabulary.parse(words)
    allowed = possible_labels(words)
    picture = pictures[0]
    encoding = tiny.encode(picture)
    many = [*words, *(f"never seen {number}" for number in range(120))]  # by bounds
    assert set(np.unique(tiny.segment(encoding, many).labels)) <= allowed
    assert set(np.unique(best_words(tiny.scores(encoding, vocabulary), encoding.sizes.image, len(words)))) <= allowed
    tiling = Tiling.plan(picture.shape[:2], 80)
    assert (
        set(np.unique(np.concatenate(list(label_by_tiles(tiny, ArrayRaster(picture), vocabulary, tiling))))) <= allowed
    )
    predictor = AugmentedPredictor(tiny, vocabulary, scales=(1.0, 1.5))
    assert set(np.unique(predictor.predict([predictor.prepare("a", picture)])[0])) <= allowed


@pytest.mark.slow
def test_an_exported_model_decides_alike(tiny, pictures, tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    exported, parity = export(tiny.model, tmp_path / "exported")
    assert parity.passed
    segmenter = opensan.load(exported, threads=1, text_cache=False)
    for words in VOCABULARIES:
        vocabulary = Vocabulary.parse(words)
        alone = [index for index, word in enumerate(words) if word in UNSEEN]
        for encoding in segmenter.encode(pictures, batch_size=3):
            probabilities = segmenter.class_probabilities(encoding, vocabulary)[:, alone]
            assert (probabilities == probabilities[:, :1]).all()
            assert set(np.unique(segmenter.segment(encoding, vocabulary).labels)) <= possible_labels(words)
