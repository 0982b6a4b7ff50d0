"""Texts and templates that are suggested for a folder without labels: what is tried, judged, shown and written."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from opensan.assemble.bands import to_array
from opensan.assemble.interpolation import masks_at
from opensan.errors import UserError
from opensan.segmenters.san import SanSegmenter
from opensan.tune import suggest
from opensan.tune.suggest import Change, bundled_descriptions, read_descriptions, suggest_words
from opensan.vocabulary import TEMPLATE_SETS, Vocabulary


@pytest.fixture(scope="module")
def segmenter(small_model) -> SanSegmenter:
    return SanSegmenter(small_model, text_cache=False)


def picture(seed: int, size: tuple[int, int] = (60, 45)) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize(size))


def test_bundled_descriptions_are_texts_that_a_vocabulary_takes():
    found = bundled_descriptions()
    assert len(found) > 100 and list(found) == sorted(found)
    for word, texts in found.items():
        Vocabulary.parse([{"name": word, "synonyms": texts}])


def test_every_text_is_tried_alone_and_joined_and_others_are_left_out():
    words = Vocabulary.parse(["road|tarmac", "car", {"name": "sky", "prompts": ["a sky."]}])
    tried = list(suggest._tried(words, {"road": ["my road"], "car": ["tarmac"]}))
    of_words = {(word, texts): origin for word, texts, origin, _ in tried}
    assert of_words["road", ("tarmac",)] == "synonym"
    assert of_words["road", ("my road",)] == "yours"
    assert of_words["road", ("road", "tarmac", "my road")] == "joined"
    assert of_words["road", ("tarmac",)] == "synonym" and of_words["car", ("a parked car",)] == "description"
    assert ("car", ("tarmac",)) not in of_words, "another word has this text"
    assert not [one for one in of_words if one[0] == "sky"], "its sentences are the user's"
    sets = [texts for word, texts, *_ in tried if not word]
    assert TEMPLATE_SETS["vild"] not in sets and TEMPLATE_SETS["single"] in sets
    for word, texts, _, changed in tried:
        if word:
            assert changed.words[words.find(word)].synonyms == texts and changed.names == words.names


def test_the_figures_are_those_of_the_labels(segmenter):
    """Agreement with the mirrored image at the grid's pixels, computed from whole label maps."""
    words = Vocabulary.parse("road, sky, tree")
    image = picture(1)
    seen = suggest.see(segmenter, image)
    own = suggest.answers_of(segmenter, [seen], words)
    labels, mirrored = (segmenter.segment(one, words).labels for one in (image, np.ascontiguousarray(image[:, ::-1])))
    rows, columns = (np.linspace(0, side - 1, suggest.GRID).round().astype(int) for side in image.shape[:2])
    there = labels[np.ix_(rows, columns)].ravel()
    assert (own.winners[0] == there).mean() > 0.995
    two = suggest.answers_of(segmenter, [suggest.SeenImage(seen.views[:2])], words)
    same = (there == mirrored[:, ::-1][np.ix_(rows, columns)].ravel()).mean()
    assert two.agreement[0] == pytest.approx(same, abs=0.01)
    assert 0 < own.margin[0] < 1
    flipped, masks = seen.views[1]
    corner = masks_at(to_array(flipped["mask_logits"]), flipped.sizes, 0, image.shape[1] - 1)
    np.testing.assert_allclose(masks[0], corner, rtol=1e-4)  # of the pixel that was on the left


def change(word: str, text: str, margin: float, low: float) -> Change:
    return Change(word, (text,), "yours", 0.1, margin, (low, low), 0.5, 0.1)


def test_only_what_surely_raises_both_figures_is_suggested():
    words = Vocabulary.parse("road, sky")
    changes = [change("road", "tarmac", 0.3, 0.1), change("road", "asphalt", 0.2, 0.1), change("sky", "air", 0.5, -0.1)]
    assert [one.suggested for one in changes] == [True, True, False]
    assert suggest._applied(words, changes).words[0].synonyms == ("tarmac",)
    assert suggest._applied(words, changes).words[1] == words.words[1]
    assert not replace(changes[0], surely=(0.1, 0.0)).suggested
    assert not replace(changes[0], loses=("sky",)).suggested


def test_words_that_lose_half_of_their_pixels_are_named():
    words = Vocabulary.parse("road, sky, tree")
    own, changed = np.zeros((1, 1000), int), np.zeros((1, 1000), int)
    own[0, :100], changed[0, :49] = 1, 1  # half of it and one more
    own[0, 100:104] = 2  # too few to count
    answers = [suggest.Answers(winners, np.ones(1), np.ones(1)) for winners in (own, changed)]
    found = suggest._change(*answers, words, "sky", ("air",), "yours")
    assert found.loses == ("sky",) and found.area == 0.049 and found.moved == 0.055
    changed[0, :50] = 1
    assert not suggest._change(*answers, words, "sky", ("air",), "yours").loses


def test_an_interval_needs_two_images():
    assert suggest._low(np.array([0.5])) == -np.inf
    assert suggest._low(np.array([0.5, 0.5])) == 0.5
    assert suggest._low(np.array([0.1, 0.9, 0.5])) < 0 < suggest._low(np.array([0.4, 0.6, 0.5] * 10))


def test_words_are_never_changed(segmenter):
    words = Vocabulary.parse("road, sky")
    found = suggest_words(segmenter, [picture(1), picture(2)], words)
    assert found.words == words and found.images == 2 and len(found.changes) > 10
    assert [one.word for one in found.changes] == sorted(
        (one.word for one in found.changes), key=["", "road", "sky"].index
    )
    if not any(one.suggested for one in found.changes):
        assert found.suggested == words


@pytest.mark.parametrize(
    "images, words, more, said",
    [
        ([], "road, sky", {}, "no images"),
        ([0], "road", {}, "one word gets every pixel"),
        ([0], "road, sky", {"tree": ["a tall tree"]}, "descriptions of 'tree', which is not among the words"),
    ],
)
def test_what_cannot_be_tried_is_refused_in_a_line(images, words, more, said, segmenter):
    with pytest.raises(UserError, match=said):
        suggest_words(segmenter, [picture(one) for one in images], Vocabulary.parse(words), descriptions=more)


@pytest.mark.parametrize("content", ["[", "[]", '{"car": "a car"}', '{"car": []}', '{"car": [1]}', '{"car": [" "]}'])
def test_unusable_descriptions_are_refused_in_a_line(content, tmp_path):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(UserError, match=r"mine\.json: ") as caught:
        read_descriptions(tmp_path / "mine.json")
    assert "\n" not in str(caught.value)


def test_the_command_shows_figures_and_writes_only_if_told_to(run, tmp_path, model_folder, monkeypatch):
    (tmp_path / "photos").mkdir()
    for seed in range(3):
        Image.fromarray(picture(seed)).save(tmp_path / "photos" / f"{seed}.png")
    (tmp_path / "mine.json").write_text('{"road": ["my road"]}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Change, "suggested", property(lambda change: change.texts == ("my road",)))
    asked = ("tune", "words", "--without-labels", "photos", "--words", "road, sky", "--model", model_folder)
    code, out, err = run(*asked, "--descriptions", "mine.json")
    assert code == 0, err
    assert "3 images" in out and "* my road" in out and "nothing was changed" in out
    assert {path.name for path in tmp_path.iterdir()} - {"text-cache"} == {"photos", "mine.json"}
    code, out, err = run(*asked, "--descriptions", "mine.json", "--out", "suggested.json")
    assert code == 0 and "wrote suggested.json" in out
    assert Vocabulary.from_file(tmp_path / "suggested.json").words[0].synonyms == ("my road",)
    code, _, err = run(*asked, "--out", "suggested.json")
    assert code == 1 and "is there already" in err
    code, out, err = run(*asked, "--descriptions", "mine.json", "--json", "--images", 1)
    told = json.loads(out)
    assert told["images"] == 1 and any(one["suggested"] for one in told["changes"])


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((), "give either labelled images, or --without-labels"),
        (("data", "--without-labels", "photos"), "give either labelled images, or --without-labels"),
        (("data", "--descriptions", "mine.json"), "--descriptions belongs to --without-labels"),
        (("--without-labels", "photos"), "--without-labels needs the words"),
        (("--without-labels", "photos", "--words", "road, sky"), "photos"),
    ],
)
def test_wrong_calls_are_refused_in_a_line(run, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("tune", "words", *arguments, "--model", "tiny")
    assert code in (1, 2) and said in err and err.count("\n") == 1
