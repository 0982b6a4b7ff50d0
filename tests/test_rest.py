"""None of these: pixels that no asked word deserves stay unlabelled."""

import json

import numpy as np
import pytest

import opensan
from opensan.assemble.scores import score_maps
from opensan.cli import main
from opensan.errors import UserError
from opensan.files import ASSETS
from opensan.lab.san_training import SceneDataset
from opensan.lab.scenes import SEGMENTATION_NAMES
from opensan.model.identity import model_identity
from opensan.vocabulary import Vocabulary, Word

from .test_any_segmenter import WORDS, ColourSegmenter, stripes

SCENE = ASSETS / "scenes" / "playground.png"


@pytest.fixture(scope="module")
def tiny():
    return opensan.load("tiny", text_cache=False)


def test_pixels_of_no_asked_word_stay_unlabelled_and_those_of_the_asked_word_are_kept(tiny):
    scenes = SceneDataset(21, 8, (192, 256), "test", SEGMENTATION_NAMES)
    right, kept = [], []
    for index in range(8):
        image, truth = scenes[index]
        word = int(np.bincount(truth[truth >= 0]).argmax())
        encoding = tiny.encode(image)
        plain = tiny.segment(encoding, [SEGMENTATION_NAMES[word]])
        assert (plain.labels == 0).all()
        labels = plain.relabel([SEGMENTATION_NAMES[word]], rest=True).labels
        right.append((labels[truth != word] == -1).mean())
        kept.append((labels[truth == word] == 0).mean())
    assert np.mean(right) > 0.8 and np.mean(kept) > 0.75, (right, kept)


def test_labels_without_rest_are_as_before(tiny):
    encoding = tiny.encode(str(SCENE))
    before = tiny.segment(encoding, "brick, night sky")
    tiny.segment(encoding, "brick, night sky", rest=True)
    assert (tiny.segment(encoding, "brick, night sky").labels == before.labels).all()
    assert [word.name for word in before.vocabulary.words] == ["brick", "night sky"]


def test_background_words_and_the_rest_both_count(tiny):
    segmentation = tiny.segment(str(SCENE), "brick", background="night sky", rest=True)
    names = [word.name for word in segmentation.vocabulary.words]
    assert names == ["brick", "night sky", "none of these"]
    assert segmentation.names == ["brick"]


def test_the_rest_is_a_share_of_no_object_and_changes_no_other_probability(tiny):
    encoding = tiny.encode(str(SCENE))
    plain = Vocabulary.parse("brick, sand|beach, night sky")
    before, after = (tiny.class_probabilities(encoding, words) for words in (plain, plain.with_rest(tiny.rest_share)))
    assert (before - after[:, :3]).abs().max() < 1e-5
    assert (after[:, 3] - tiny.rest_share * (1 - before.sum(1))).abs().max() < 1e-5
    scores = score_maps(encoding["mask_logits"], after, encoding.sizes)
    expected = np.where(scores.argmax(0).numpy() < 3, scores.argmax(0).numpy(), -1)
    assert (tiny.segment(encoding, plain, rest=True).labels == expected).mean() > 0.999


def test_the_name_of_the_rest_may_be_an_asked_word():
    words = Vocabulary.parse("none of these, brick").with_rest(0.5).words
    assert len({word.name for word in words}) == 3 and words[-1].absorbs


def test_a_vocabulary_with_a_share_is_read_back():
    words = Vocabulary((Word("brick"), Word("sand", absorbs=True, nothing=0.3)))
    assert Vocabulary.parse(json.loads(json.dumps(words.to_dict()))) == words
    with pytest.raises(UserError, match='"nothing" must be a factor from 0 to 10, not 20'):
        Vocabulary.parse([{"name": "sand", "nothing": 20}])


def test_each_model_has_its_own_share_which_is_no_part_of_its_identity(tiny):
    photo = opensan.load("photo", text_cache=False)
    assert tiny.rest_share == 0.5 and photo.rest_share > 1
    assert photo.with_rest(Vocabulary.parse("dog")).words[-1].nothing == photo.rest_share
    other = photo.model.snapshot()
    other.config = other.config.model_copy(update={"rest_share": 0.5})
    assert model_identity(other) == photo.identity


def test_a_model_without_proposals_says_so():
    with pytest.raises(UserError, match="the rest needs a model with mask proposals, and colours has none"):
        ColourSegmenter().segment(stripes(), WORDS, rest=True)


def test_the_command_leaves_the_rest_unlabelled(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["segment", str(SCENE), "-w", "brick", "--rest", "-m", "tiny", "-o", str(tmp_path), "--json"])
    output = capsys.readouterr()
    assert not caught.value.code, output.err
    assert 0.2 < json.loads(output.out)["unlabelled"] < 0.9
