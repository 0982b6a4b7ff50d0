"""The packaged model: small, offline, and right about scenes that it never saw."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import opensan
from opensan.checkpoints.hub import BUNDLED
from opensan.evaluation.evaluation import evaluate, segmenter_predictor
from opensan.lab.san_training import SceneDataset, base_and_novel
from opensan.lab.scenes import BASE_NAMES, NOVEL_NAMES, SEGMENTATION_NAMES

SCENE = Path(opensan.__file__).parent / "assets" / "scenes" / "playground.png"


@pytest.fixture(scope="module")
def tiny():
    return opensan.load("tiny", text_cache=False)


def test_it_is_small():
    assert sum(file.stat().st_size for file in BUNDLED["tiny"].iterdir()) <= 12_000_000


def test_base_and_novel_words_on_unseen_scenes(tiny):
    """Far below the figures of the model card, and far above what guessing or a wrong computation would give."""
    dataset = SceneDataset(5_000_011, 40, (240, 320), "test", SEGMENTATION_NAMES)
    found = evaluate(segmenter_predictor(tiny, dataset.vocabulary), dataset, progress=False)
    figures = base_and_novel(found.metrics)
    assert figures["miou_base"] > 0.3
    assert figures["miou_novel"] > 0.2


def test_synonyms_and_other_words_on_the_bundled_scene(tiny):
    seg = tiny.segment(SCENE, ["night sky", "brick"])
    assert seg.labels.shape == np.asarray(Image.open(SCENE)).shape[:2]
    assert seg.areas["night sky"] > 0.3
    swapped = seg.relabel(["brick", "night sky"])
    np.testing.assert_array_equal(seg.labels == 0, swapped.labels == 1)


def test_it_says_which_words_it_has_never_seen(tiny):
    with pytest.warns(UserWarning, match="has never seen a word of: 'giraffe'"):
        tiny.segment(SCENE, ["giraffe", "brick"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny.segment(SCENE, [*BASE_NAMES[:5], *NOVEL_NAMES[:5]])
