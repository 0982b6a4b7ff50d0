"""Words tuned with few labelled images: what is fitted, what stays, what is refused, and where the words work."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import opensan
from opensan.assemble.bands import to_array
from opensan.assemble.interpolation import masks_at, masks_of_pixels
from opensan.assemble.scores import score_maps
from opensan.errors import UserError
from opensan.lab.scenes import GROUNDS, SHAPES, label_map, make_scene
from opensan.segmenters.san import SanSegmenter
from opensan.structures import Identity
from opensan.tune.examples import PIXELS_OF_A_WORD, example_of, read_examples
from opensan.tune.run import encode_examples
from opensan.tune.vectors import confusion, folds, pixel_scores
from opensan.vocabulary import Vocabulary
from opensan.word_lists import TunedWords

WORDS = ["road", "car|automobile", "sky", "tree"]
DRAWN = [*SHAPES, *GROUNDS]
"""The words of drawn scenes here."""


@pytest.fixture(scope="module")
def segmenter(small_model) -> SanSegmenter:
    return SanSegmenter(small_model, text_cache=False)


def picture(seed: int = 0, size: tuple[int, int] = (60, 45)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size)


def vectors(segmenter, **numbers) -> TunedWords:
    """Random vectors for the words named, and for the context if it is among them."""
    made = {
        name.replace("_", " "): np.random.default_rng(seed).standard_normal(24).astype("<f2").tobytes()
        for name, seed in numbers.items()
    }
    context = made.pop("context", None)
    identity = segmenter.identity
    return TunedWords(identity.name, identity.image, identity.text, tuple(made.items()), context)


def drawn(count: int, first: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Drawn scenes in colours that `tiny` never saw: red and blue have changed places."""
    scenes = [make_scene(5, first + number, (96, 128), split="test") for number in range(count)]
    return [(scene.image[..., ::-1].copy(), label_map(scene, DRAWN)) for scene in scenes]


def swapped_vectors(segmenter) -> TunedWords:
    """Sand and snow with each other's row."""
    rows = segmenter.text.classifier(Vocabulary.parse("snow, sand")).rows.numpy().astype("<f2")
    identity = segmenter.identity
    return TunedWords(
        "tiny", identity.image, identity.text, tuple(zip(("sand", "snow"), map(bytes, rows), strict=True))
    )


def on_disk(folder: Path, pairs, lists: bool = True) -> Path:
    """Write a set in the canonical layout."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for number, (image, labels) in enumerate(pairs):
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
        Image.fromarray(np.where(labels < 0, 255, labels).astype(np.uint8)).save(folder / "labels" / f"{number}.png")
    (folder / "classes.txt").write_text("\n".join(DRAWN))
    if lists:
        (folder / "train.txt").write_text("\n".join(map(str, range(len(pairs)))))
    return folder


# ------------------------------------------------------------------------------------------------- words with vectors


def test_words_with_vectors_are_written_and_read_back(segmenter, tmp_path):
    words = replace(Vocabulary.parse(WORDS), tuned=vectors(segmenter, sky=1, context=2))
    again = Vocabulary.parse(json.loads(json.dumps(words.to_dict(vectors=True))))
    assert again == words and hash(again) == hash(words)
    (tmp_path / "tuned.json").write_text(json.dumps(words.to_dict(vectors=True)))
    assert Vocabulary.from_file(tmp_path / "tuned.json") == words
    (tmp_path / "words.json").write_text(json.dumps({"words": ["sky", "grass"], "tuned": "tuned.json"}))
    named = Vocabulary.from_file(tmp_path / "words.json", background="wall")
    assert named.tuned == words.tuned and list(named.tuned_rows) == [0]


def test_results_name_vectors_by_their_checksum(segmenter):
    words = replace(Vocabulary.parse(WORDS), tuned=vectors(segmenter, sky=1))
    other = replace(words, tuned=vectors(segmenter, sky=2))
    assert words.to_dict() != other.to_dict()
    assert set(words.to_dict()["tuned"]) == {"model", "sha256"}
    with pytest.raises(UserError, match="give the word file of `opensan tune words`"):
        Vocabulary.parse(words.to_dict())


@pytest.mark.parametrize(
    "tuned, said",
    [
        (3, "must be an object"),
        ({"image": "a"}, "must be an object"),
        ({"image": "a", "text": 1}, "must be an object"),
        ({"image": "a", "text": "b", "rows": {"sky": "?"}}, "the vector of 'sky' is damaged"),
        ({"image": "a", "text": "b", "rows": {"sky": "AAAA"}}, "the vector of 'sky' is damaged"),
        ({"image": "a", "text": "b", "context": ""}, "the vector of the context is damaged"),
    ],
)
def test_damaged_vectors_are_refused_in_a_line(tuned, said):
    with pytest.raises(UserError, match=said) as caught:
        Vocabulary.parse({"words": ["sky"], "tuned": tuned})
    assert "\n" not in str(caught.value)


def test_a_word_file_that_names_no_tuned_words_is_refused(tmp_path):
    (tmp_path / "words.json").write_text('{"words": ["sky"], "tuned": "other.json"}')
    with pytest.raises(UserError, match=r"other.json: can't be read"):
        Vocabulary.from_file(tmp_path / "words.json")
    (tmp_path / "other.json").write_text('{"words": ["sky"]}')
    with pytest.raises(UserError, match=r"other.json: holds no tuned words"):
        Vocabulary.from_file(tmp_path / "words.json")


# --------------------------------------------------------------------------------------------------------- their rows


def test_a_tuned_word_has_its_vector_and_the_others_keep_their_rows(segmenter):
    plain = Vocabulary.parse(WORDS)
    tuned = replace(plain, tuned=vectors(segmenter, automobile=1))
    before, after = (segmenter.text.classifier(words).rows.numpy() for words in (plain, tuned))
    changed = (before != after).any(axis=1)
    assert changed.tolist() == [False, False, True, False, False]  # road, car, automobile, sky, tree
    expected = np.frombuffer(tuned.tuned.rows[0][1], "<f2").astype(np.float32)
    np.testing.assert_allclose(after[2], expected / np.linalg.norm(expected), rtol=1e-6)


def test_a_context_moves_the_rows_without_a_vector(segmenter):
    plain = Vocabulary.parse(WORDS)
    tuned = replace(plain, tuned=vectors(segmenter, sky=1, context=2))
    before, after = (segmenter.text.classifier(words).rows.numpy() for words in (plain, tuned))
    moved = before + np.frombuffer(tuned.tuned.context, "<f2").astype(np.float32)
    moved /= np.linalg.norm(moved, axis=1, keepdims=True)
    np.testing.assert_allclose(np.delete(after, 3, 0), np.delete(moved, 3, 0), rtol=1e-5, atol=1e-7)
    assert not np.allclose(after[3], moved[3], atol=1e-3)


def test_tuned_words_are_refused_by_any_other_model(segmenter, fresh_model):
    tuned = replace(Vocabulary.parse(WORDS), tuned=vectors(segmenter, sky=1))
    for other in (
        SanSegmenter(fresh_model(), text_cache=False),
        opensan.load("tiny", text_cache=False),
    ):
        with pytest.raises(UserError, match="tuned for the model small") as caught:
            other.segment(picture(), tuned)
        assert "\n" not in str(caught.value)


def test_the_image_half_counts_too(segmenter):
    for change in ({"image": "0" * 64}, {"text": "0" * 64}):
        words = replace(Vocabulary.parse(WORDS), tuned=replace(vectors(segmenter, sky=1), **change))
        with pytest.raises(UserError, match="tuned for the model small"):
            segmenter.prepare_words(words)


def test_another_method_on_the_same_weights_is_another_model(model_folder, segmenter):
    words = replace(Vocabulary.parse(WORDS), tuned=vectors(segmenter, sky=1))
    for method in ("maskclip", "mask-tokens"):
        with pytest.raises(UserError, match="tuned for the model small"):
            opensan.load(f"{method}:{model_folder}", text_cache=False).segment(picture(), words)


def test_a_vector_of_another_length_is_refused(segmenter):
    short = replace(vectors(segmenter), rows=(("sky", b"\0\0\0\0"),))
    with pytest.raises(UserError, match=r"the vector of 'sky' has 2 numbers.*vectors of 24"):
        segmenter.prepare_words(replace(Vocabulary.parse(WORDS), tuned=short))


def test_identities_of_exported_models_are_those_of_their_source():
    exported = Identity("small", f"{'a' * 64}-float16", f"{'b' * 64} onnx float16")
    assert exported.is_of("a" * 64, "b" * 64) and not exported.is_of("a" * 64, "c" * 64)


# ---------------------------------------------------------------------------------------------------------- examples


def test_masks_of_many_pixels_are_those_of_each():
    logits = np.random.default_rng(0).standard_normal((3, 5, 6)).astype(np.float32)
    from opensan.structures import ImageSizes

    sizes = ImageSizes((50, 70), (80, 96), (80, 96))
    pixels = np.random.default_rng(1).integers(0, 50, (700, 2))
    masks = masks_of_pixels(logits, sizes, pixels)
    for number in (0, 511, 512, 699):
        np.testing.assert_allclose(masks[number], masks_at(logits, sizes, *pixels[number].tolist()), rtol=1e-4)
    assert masks_of_pixels(logits, sizes, pixels[:0]).shape == (0, 3)


def test_the_loss_sees_the_scores_that_label(segmenter):
    words = Vocabulary.parse(WORDS)
    image, labels = np.asarray(picture()), np.arange(45 * 60).reshape(45, 60) % 5 - 1
    example = example_of("one", image, labels, words)
    (sample,) = encode_examples(segmenter, [example])
    text = segmenter.text.classifier(words)
    encoding = segmenter.encode(image)
    expected = score_maps(encoding["mask_logits"], segmenter.class_probabilities(encoding, words), encoding.sizes)
    rows, columns = example.pixels.T
    found = pixel_scores(segmenter.model, sample.embeddings[None], sample.masks[None], text)[0]
    torch.testing.assert_close(found, expected[:, rows, columns].T.clone(), rtol=1e-3, atol=1e-5)


def test_of_a_large_word_some_pixels_are_kept_and_all_are_counted():
    labels = np.zeros((100, 100), np.int16)
    labels[0, :3] = 1
    example = example_of("one", None, labels, Vocabulary.parse("sky, road"))
    assert example.counts.tolist() == [9997, 3]
    assert np.bincount(example.labels).tolist() == [PIXELS_OF_A_WORD, 3]
    assert (labels[tuple(example.pixels.T)] == example.labels).all()


def test_figures_of_a_sample_stand_for_the_whole_image(segmenter):
    """Of a word with many pixels, each that was kept counts for many."""
    words = Vocabulary.parse("road, sky, tree")
    image = np.asarray(picture(3, (120, 90)))
    labels = np.zeros((90, 120), np.int16)
    labels[:2] = 1
    (sample,) = encode_examples(segmenter, [example_of("one", image, labels, words)])
    pixels = confusion(segmenter.model, segmenter.text.classifier(words), sample)
    assert abs(pixels.sum(axis=1) - np.array([88 * 120, 240, 0])).max() <= 3
    found = segmenter.segment(image, words).labels
    whole = np.bincount(found[labels == 0], minlength=3) / (88 * 120)
    np.testing.assert_allclose(pixels[0, :3] / pixels[0].sum(), whole, atol=0.08)


def test_the_rest_keeps_the_vectors(segmenter):
    tuned = replace(Vocabulary.parse(WORDS), tuned=vectors(segmenter, sky=1))
    assert segmenter.with_rest(tuned).tuned_rows == tuned.tuned_rows
    plain, rest = (
        segmenter.class_probabilities(segmenter.encode(picture()), one) for one in (tuned, segmenter.with_rest(tuned))
    )
    torch.testing.assert_close(rest[:, : len(WORDS)], plain, rtol=1e-4, atol=1e-6)


def test_folders_with_and_without_lists_are_read(tmp_path):
    pairs = drawn(4)
    with_lists, without = (on_disk(tmp_path / name, pairs, name == "lists") for name in ("lists", "plain"))
    found, words = read_examples(with_lists, None)
    assert words.names == DRAWN and [one.name for one in found] == ["0", "1", "2", "3"]
    again, _ = read_examples(without, None)
    assert [one.counts.tolist() for one in again] == [one.counts.tolist() for one in found]
    some, _ = read_examples(without, None, limit=2)
    assert [one.name for one in some] == ["0", "3"]
    (without / "labels" / "1.png").unlink()
    assert len(read_examples(without, None)[0]) == 3, "an image without labels is not an example"


def test_points_and_scribbles_are_read(tmp_path):
    picture().save(tmp_path / "a.png")
    points = [
        {"image": "a.png", "word": "bark", "x": 3, "y": 4},
        {"image": "a.png", "word": "Bark", "points": [[5, 6], [5, 6]]},
        {"image": "a.png", "word": "path", "scribble": [[10, 20], [14, 20]]},
        {"image": "a.png", "word": "path", "scribble": [[0, 0]]},
    ]
    (tmp_path / "points.json").write_text(json.dumps(points))
    (example,), words = read_examples(tmp_path / "points.json", Vocabulary.parse("bark, path, sky"))
    assert words.names == ["bark", "path", "sky"]
    found = {(x, y): int(label) for (y, x), label in zip(example.pixels.tolist(), example.labels, strict=True)}
    assert found == {(3, 4): 0, (5, 6): 0, (0, 0): 1, **{(x, 20): 1 for x in range(10, 15)}}


def test_points_on_a_saved_encoding_need_no_image(segmenter, tmp_path):
    encoding = segmenter.encode(picture())
    replace(encoding, image=None).save(tmp_path / "a.safetensors")
    points = [{"image": "a.safetensors", "word": word, "x": x, "y": 9} for word, x in (("sky", 5), ("road", 40))]
    (tmp_path / "points.json").write_text(json.dumps(points))
    examples, words = read_examples(tmp_path / "points.json", None)
    (sample,) = encode_examples(segmenter, examples)
    assert words.names == ["sky", "road"]
    np.testing.assert_array_equal(sample.embeddings, to_array(encoding["mask_embeddings"]))


POINT = {"image": "a.png", "word": "sky", "x": 1, "y": 2}


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "not valid JSON"),
        ("[]", "must be a list of points"),
        ([{"word": "sky", "x": 1, "y": 2}], 'point 1 needs "image" and "word"'),
        ([POINT | {"x": -1}], "point 1: a place must be a column and a row"),
        ([POINT | {"x": 1.5}], "point 1: a place must be a column and a row"),
        ([{"image": "a.png", "word": "sky"}], 'point 1 needs either "x" and "y"'),
        ([POINT | {"points": [[1, 2]]}], 'point 1 needs either "x" and "y"'),
        ([POINT | {"x": 60}], r"the point \(60, 2\) is outside a.png, which is 60x45"),
        ([POINT | {"word": "sky|air"}], "point 1 is of 'sky.air': name one word"),
        ([POINT | {"image": "b.png"}], "the image 'b.png' is not in"),
        ([POINT, POINT | {"word": "road"}], r"the point \(1, 2\) of a.png is both 'sky' and 'road'"),
        ([POINT | {"word": "sk"}], "has labels of 'sk', which is not among the words; did you mean 'sky'?"),
    ],
)
def test_unusable_points_are_refused_in_a_line(content, said, tmp_path):
    picture().save(tmp_path / "a.png")
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "points.json").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        read_examples(tmp_path / "points.json", Vocabulary.parse("sky, road"))
    assert "\n" not in str(caught.value)


def test_labels_of_words_that_are_not_asked_for_are_refused(tmp_path):
    folder = on_disk(tmp_path / "set", drawn(2))
    with pytest.raises(UserError, match=r"0\.png has labels of .*, which is not among the words.*--ignore"):
        read_examples(folder, Vocabulary.parse("sand, water"))
    _, labels = drawn(1)[0]
    present = [DRAWN[label] for label in np.unique(labels[labels >= 0])]
    examples, _ = read_examples(folder, Vocabulary.parse(present[:1]), ignored=present[1:], limit=1)
    assert examples[0].counts.tolist() == [(labels == DRAWN.index(present[0])).sum()]


@pytest.mark.parametrize(
    "made, said",
    [
        ((), "no such folder or file"),
        (("set/",), r"has no images/ or no classes.txt"),
        (("set/images/", "set/classes.txt"), "no labelled images"),
    ],
)
def test_folders_without_images_are_refused(made, said, tmp_path):
    for name in made:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).mkdir(exist_ok=True) if name.endswith("/") else (tmp_path / name).write_text("sky\nroad\n")
    with pytest.raises(UserError, match=said):
        read_examples(tmp_path / "set", None)


def test_lists_that_leave_the_choice_open_are_named(tmp_path):
    folder = on_disk(tmp_path / "set", drawn(1), lists=False)
    for name in ("mine", "yours"):
        (folder / f"{name}.txt").write_text("0\n")
    with pytest.raises(UserError, match=r"has the lists mine, yours, and no train.txt: choose one with --split"):
        read_examples(folder, None)
    assert len(read_examples(folder, None, split="mine")[0]) == 1


# ------------------------------------------------------------------------------------------------------------ tuning


def test_every_image_is_left_out_once():
    assert folds(3, 5) == [[0], [1], [2]]
    assert sorted(image for group in folds(12, 5) for image in group) == list(range(12)) and len(folds(12, 5)) == 5


@pytest.fixture(scope="module")
def tiny():
    return opensan.load("tiny", text_cache=False)


def test_tuned_words_are_better_on_images_that_were_not_labelled(tiny, tmp_path):
    tuning = opensan.tune_words(drawn(6), DRAWN, tiny, what="vectors", seeds=2)
    assert tuning.helped and tuning.held_out and len(tuning.after) == 2
    assert min(one.miou for one in tuning.after) > tuning.before.miou
    assert tuning.spread[0] <= tuning.spread[1]
    path = tuning.save(tmp_path / "tuned.json")
    words = Vocabulary.from_file(path)
    assert words == tuning.vocabulary

    def right(vocabulary) -> float:
        answers = tiny.segment([image for image, _ in drawn(6, first=100)], vocabulary)
        return float(
            np.mean([(a.labels == labels).mean() for a, (_, labels) in zip(answers, drawn(6, 100), strict=True)])
        )

    assert right(words) > right(DRAWN) + 0.02
    rows = [tiny.text.classifier(one).rows for one in (words, Vocabulary.parse(DRAWN))]
    changed = (rows[0] != rows[1]).any(dim=1)
    named = [name for name, moved in zip(DRAWN, changed, strict=True) if moved]
    assert set(named).isdisjoint(tuning.unlabelled), "words without labels keep their rows to the last bit"


def test_the_same_call_gives_the_same_vectors(tiny):
    first, second = (
        opensan.tune_words(drawn(2), DRAWN, tiny, what=what, seeds=1).vocabulary for what in ("both", "both")
    )
    assert first == second


def test_points_of_one_image_tune_without_one_left_out(tiny, tmp_path):
    image, labels = drawn(1)[0]
    Image.fromarray(image).save(tmp_path / "a.png")
    points = []
    for label in np.unique(labels[labels >= 0]):
        y, x = np.argwhere(labels == label)[len(np.argwhere(labels == label)) // 2].tolist()
        points.append({"image": "a.png", "word": DRAWN[label], "x": x, "y": y})
    (tmp_path / "points.json").write_text(json.dumps(points))
    tuning = opensan.tune_words(tmp_path / "points.json", None, tiny, out=tmp_path / "tuned.json")
    assert not tuning.held_out and tuning.pixels == len(points) and (tmp_path / "tuned.json").exists()
    assert min(one.pixel_accuracy for one in tuning.after) >= tuning.before.pixel_accuracy


@pytest.mark.parametrize(
    "pixels, said",
    [
        ([], "no pixel is labelled"),
        ([(0, 0, 0)], "the only labelled pixel is of 'road'"),
        ([(0, 0, 0), (0, 1, 0)], "all 2 labelled pixels are of 'road'"),
    ],
)
def test_too_few_labels_are_refused_in_a_line(pixels, said, segmenter):
    labels = np.full((45, 60), -1)
    for row, column, label in pixels:
        labels[row, column] = label
    with pytest.raises(UserError, match=said):
        opensan.tune_words([(np.asarray(picture()), labels)], WORDS, segmenter)


def test_labels_of_another_size_or_word_are_refused(segmenter):
    image = np.asarray(picture())
    labels = np.arange(45 * 60).reshape(45, 60) % 2
    with pytest.raises(UserError, match="image 1: its labels are 60x44, the image 60x45"):
        opensan.tune_words([(image, labels[1:])], WORDS, segmenter)
    with pytest.raises(UserError, match="labels of image 1 hold 4, and there are 4 words"):
        opensan.tune_words([(image, labels + 3)], WORDS, segmenter)
    with pytest.raises(UserError, match="what 'all' is not one of"):
        opensan.tune_words([(image, labels)], WORDS, segmenter, what="all")
    with pytest.raises(UserError, match="words are needed"):
        opensan.tune_words([(image, labels)], None, segmenter)


def test_a_model_that_classifies_otherwise_is_refused(model_folder):
    pair = (np.asarray(picture()), np.arange(45 * 60).reshape(45, 60) % 2)
    with pytest.raises(UserError, match="words are tuned with SAN as torch runs it"):
        opensan.tune_words([pair], WORDS, opensan.load(f"maskclip:{model_folder}", text_cache=False))


def test_where_nothing_helps_nothing_is_written(run, segmenter, tmp_path, model_folder):
    """Labels of noise, at random: images left out can't get better in the long run."""
    chance = np.random.default_rng(0)
    pairs = [(np.asarray(picture(seed)), chance.integers(0, 2, (45, 60))) for seed in range(2)]
    folder = on_disk(tmp_path / "set", pairs)
    (folder / "classes.txt").write_text("road\nsky\n")
    code, out, err = run("tune", "words", folder, "--model", model_folder, "--out", tmp_path / "t.json", "--json")
    told = json.loads(out)
    assert (told["file"] is None) == (code == 1) == (not (tmp_path / "t.json").exists()) == (told["steps"] == 0)
    if code:
        assert "nothing written: images that were left out got no better" in err


# ------------------------------------------------------------------------------------------------------ the commands


def test_the_command_writes_words_that_other_commands_take(run, tmp_path):
    folder = on_disk(tmp_path / "set", drawn(4))
    words = tmp_path / "tuned.json"
    code, out, err = run("tune", "words", folder, "--model", "tiny", "--out", words, "--seeds", 2)
    assert code == 0, err
    assert "4 images" in out and "mean IoU" in out and "by seed" in out and f"wrote {words}" in out
    image = folder / "images" / "0.png"
    code, _, err = run("segment", image, "--words-file", words, "--model", "tiny", "--out", tmp_path / "out")
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "0.segments.json").read_text())
    assert record["vocabulary"]["tuned"]["sha256"] == Vocabulary.from_file(words).tuned.digest
    code, _, err = run("segment", image, "--words-file", words, "--model", "photo", "--out", tmp_path / "out")
    assert code == 1 and "tuned for the model tiny" in err and err.count("\n") == 1


def test_an_evaluation_takes_tuned_words(run, tmp_path):
    folder = on_disk(tmp_path / "set", drawn(3))
    words = tmp_path / "tuned.json"
    vocabulary = replace(Vocabulary.parse(DRAWN), tuned=swapped_vectors(opensan.load("tiny")))
    words.write_text(json.dumps(vocabulary.to_dict(vectors=True)))
    figures = []
    for number, more in enumerate(([], ["--tuned", words])):
        arguments = ("--data", folder, "--split", "train", "--model", "tiny", "--json", "--out", tmp_path / str(number))
        code, out, err = run("eval", *arguments, *more)
        assert code == 0, err
        figures.append(json.loads(out)[0]["metrics"]["pixel_accuracy"])
    answers = opensan.load("tiny").segment([image for image, _ in drawn(3)], vocabulary)
    right = sum((one.labels == labels).sum() for one, (_, labels) in zip(answers, drawn(3), strict=True))
    assert figures[1] == pytest.approx(right / (3 * 96 * 128)) and figures[0] != figures[1]


def test_a_list_of_words_that_somebody_wrote_is_not_replaced(run, tmp_path):
    (tmp_path / "words.json").write_text('["sky", "road"]')
    code, _, err = run("tune", "words", tmp_path, "--model", "tiny", "--out", tmp_path / "words.json")
    assert code == 1 and "is there already, and holds no tuned words" in err
    assert run("tune", "words", tmp_path, "--model", "tiny", "--out", tmp_path / "words.txt")[0] == 1


def test_the_service_takes_tuned_words(segmenter):
    pytest.importorskip("fastapi")
    from starlette.testclient import TestClient

    from opensan.serve import create_app

    words = replace(Vocabulary.parse(WORDS), tuned=vectors(segmenter, sky=1, road=2, context=3))
    tuned = words.tuned.to_dict()
    with TestClient(create_app(segmenter)) as client:
        import io

        file = io.BytesIO()
        picture().save(file, "PNG")
        name = client.post("/v1/encodings", content=file.getvalue(), headers={"Content-Type": "image/png"}).json()["id"]

        def labels(**more) -> np.ndarray:
            answer = client.post(
                f"/v1/encodings/{name}/segmentation", json={"words": WORDS, **more}, params={"format": "labels"}
            )
            assert answer.status_code == 200, answer.text
            return np.asarray(Image.open(io.BytesIO(answer.content)))

        expected = segmenter.segment(picture(), words).labels
        np.testing.assert_array_equal(labels(tuned=tuned), expected)
        assert (labels() != expected).any()
        form = client.post(
            "/v1/segmentation",
            data={"words": ",".join(WORDS), "tuned": json.dumps(tuned)},
            files={"image": ("a.png", file.getvalue(), "image/png")},
            params={"format": "labels"},
        )
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(form.content))), expected)
        for wrong, said in (({**tuned, "image": "0" * 64}, "tuned for the model"), ({"text": ""}, "tuned")):
            answer = client.post(f"/v1/encodings/{name}/segmentation", json={"words": WORDS, "tuned": wrong})
            assert answer.status_code == 422 and said in answer.json()["detail"], answer.text
