"""An explanation names what moved the answer."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import opensan
from opensan.assemble.interpolation import masks_at
from opensan.cli import main
from opensan.errors import UserError
from opensan.files import ASSETS

SCENE = ASSETS / "scenes" / "playground.png"
WORDS = "night sky, brick, green heart, red circle"


@pytest.fixture(scope="module")
def tiny():
    return opensan.load("tiny", text_cache=False)


@pytest.fixture(scope="module")
def segmentation(tiny):
    return tiny.segment(str(SCENE), WORDS)


def without(encoding, proposals):
    """Return the encoding without some proposals: masks of nothing."""
    logits = torch.as_tensor(encoding["mask_logits"]).clone()
    logits[list(proposals)] = -100
    return replace(encoding, arrays={**encoding.arrays, "mask_logits": logits})


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_without_the_named_proposals_the_label_changes(tiny, segmentation, share):
    height, width = segmentation.labels.shape
    x, y = int(share * width), int((1 - share) * height)
    explanation = segmentation.explain(x, y, otherwise=False)
    assert explanation.word == segmentation.names[segmentation.labels[y, x]]
    deciding = [proposal.index for proposal in explanation.proposals if proposal.share > 0.02]
    changed = tiny.segment(without(segmentation.encoding, deciding), WORDS)
    score = changed.explain(x, y, otherwise=False).words
    assert changed.labels[y, x] != segmentation.labels[y, x] or score[0].score < 0.1 * explanation.words[0].score
    others = [q for q in range(32) if q not in deciding][:10]
    kept = tiny.segment(without(segmentation.encoding, others), WORDS)
    assert kept.labels[y, x] == segmentation.labels[y, x]


def test_the_first_proposal_alone_turns_labels(tiny, segmentation):
    points = [(x, y) for x in range(40, 640, 120) for y in range(40, 480, 120)]
    first = {point: segmentation.explain(*point, otherwise=False).proposals[0].index for point in points}
    turned = []
    for proposal in set(first.values()):
        changed = tiny.segment(without(segmentation.encoding, [proposal]), WORDS)
        turned += [changed.labels[y, x] != segmentation.labels[y, x] for (x, y), q in first.items() if q == proposal]
    assert sum(turned) >= 3, turned


def test_shares_and_scores_are_those_of_the_sum(tiny, segmentation):
    explanation = segmentation.explain(100, 50, otherwise=False)
    encoding = segmentation.encoding
    probabilities = tiny.class_probabilities(encoding, segmentation.vocabulary).numpy()
    masks = masks_at(np.asarray(encoding["mask_logits"]), encoding.sizes, 50, 100)
    scores = masks @ probabilities
    assert [word.score for word in explanation.words] == pytest.approx(sorted(scores.tolist(), reverse=True), abs=1e-5)
    assert sum(proposal.share for proposal in explanation.proposals) <= 1 + 1e-5


def test_what_separates_two_words_sums_up_to_their_difference(segmentation):
    explanation = segmentation.explain(100, 50, otherwise=False)
    first, second = (word.name for word in explanation.words[:2])
    parts = segmentation.separating(100, 50, first, second)
    sizes = [abs(part) for _, part in parts]
    assert sizes == sorted(sizes, reverse=True)
    difference = explanation.words[0].score - explanation.words[1].score
    assert sum(part for _, part in parts) == pytest.approx(difference, abs=0.05)
    with pytest.raises(UserError, match="has no word 'brik'; did you mean 'brick'"):
        segmentation.separating(100, 50, first, "brik")


def test_proposals_are_named_among_all_bundled_words(segmentation):
    for proposal in segmentation.explain(100, 50).proposals:
        assert len(proposal.otherwise) == 3
        shares = [share for _, share in proposal.otherwise]
        assert shares == sorted(shares, reverse=True) and 0 <= shares[-1] <= shares[0] <= 1


def test_the_attention_bias_is_that_of_the_model(tiny, segmentation):
    bias = tiny.attention_bias(segmentation.encoding, [3, 0])
    prepared = tiny.prepare(segmentation.image).prepared
    with torch.inference_mode():
        expected = tiny.model.propose(torch.as_tensor(prepared.pixels)[None]).attention_bias[0]
    assert bias.shape[:2] == (2, expected.shape[0])
    height, width = bias.shape[2:]
    assert np.allclose(bias[0], expected[:, 3, :height, :width]) and np.allclose(
        bias[1], expected[:, 0, :height, :width]
    )


def test_what_an_sls_token_attended_to_are_weights_that_follow_the_steering(tiny, segmentation):
    weights = tiny.attended(segmentation.encoding, [3, 0])
    bias = tiny.attention_bias(segmentation.encoding, [3, 0])
    assert weights.shape[:2] == bias.shape[:2] and (weights >= 0).all()
    assert weights.sum(axis=(2, 3)).min() > 0.2 and weights.sum(axis=(2, 3)).max() <= 1 + 1e-4
    model = tiny.model
    pixels = torch.as_tensor(tiny.prepare(segmentation.image).prepared.pixels)[None]
    with torch.inference_mode():
        features = model.shallow_features(pixels)
        steering = torch.zeros(1, model.clip.attention_heads, 2, *features.grid)
        steering[:, :, 1, 2, 3] = 50
        found = model.clip.attended(features, steering)
    assert found[0, :, 1, 2, 3].min() > 0.999 and found[0, :, 0, 2, 3].max() < 0.5


def test_the_weights_of_a_pooling_are_those_of_its_embedding():
    photo = opensan.load("photo", text_cache=False)
    pixels = torch.as_tensor(
        photo.prepare(np.asarray(Image.open(SCENE).convert("RGB").resize((160, 120)))).prepared.pixels
    )
    with torch.inference_mode():
        weights = photo.model.attended(pixels[None])
        features = photo.model.shallow_features(pixels[None])
        expected = photo.model.propose(pixels[None]).mask_embeddings
        found = photo.model.clip.embed(weights[:, 0].flatten(2) @ features.tokens)
    assert torch.allclose(weights.sum(dim=(1, 3, 4)), torch.ones(()), atol=1e-4)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(("x", "y"), [(640, 0), (0, 480), (-1, 3)])
def test_a_pixel_outside_the_image_is_refused(segmentation, x, y):
    with pytest.raises(UserError, match=rf"pixel \({x}, {y}\) is outside the image of 640 x 480"):
        segmentation.explain(x, y)


def run(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    output = capsys.readouterr()
    return caught.value.code or 0, output.out, output.err


def test_the_command_draws_the_explanation(tmp_path, capsys):
    command = ["segment", str(SCENE), "-w", WORDS, "-m", "tiny", "-o", str(tmp_path), "--format", "png"]
    code, out, error = run([*command, "--explain", "100,50"], capsys)
    assert code == 0 and "playground.explained.png" in out, error
    with Image.open(tmp_path / "playground.explained.png") as picture:
        assert picture.width > 400 and picture.height > 400


@pytest.mark.parametrize(
    ("pixel", "message"), [("640,10", "outside the image of 640 x 480"), ("ten,5", "must be a column and a row")]
)
def test_a_wrong_pixel_ends_the_command_before_the_work(pixel, message, tmp_path, capsys):
    command = ["segment", str(SCENE), "-w", WORDS, "-m", "no such model", "-o", str(tmp_path), "--explain", pixel]
    code, _, error = run(command, capsys)
    assert code == 2 and message in error
