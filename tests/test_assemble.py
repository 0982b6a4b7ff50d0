"""The label map, against the official sequence of resizes written out in full."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from opensan.assemble import labels, scores
from opensan.assemble.bounds import first_maximum, mask_errors
from opensan.assemble.interpolation import interpolation_matrix, masks_at
from opensan.assemble.labels import label_map, label_map_by_bands, label_map_by_bounds
from opensan.assemble.resize import linear_pieces
from opensan.assemble.scores import label_scores, score_maps
from opensan.structures import ImageSizes

CLEAR_MARGIN = 1e-4


def plain_scores(mask_logits: torch.Tensor, probabilities: torch.Tensor, sizes: ImageSizes) -> torch.Tensor:
    """Bilinear to the padded size, crop, bilinear to the image, sigmoid, weighted sum: all at full size."""
    masks = F.interpolate(mask_logits[None], size=sizes.padded, mode="bilinear", align_corners=False)
    masks = masks[..., : sizes.network[0], : sizes.network[1]]
    masks = F.interpolate(masks, size=sizes.image, mode="bilinear", align_corners=False)[0].sigmoid()
    return torch.einsum("qk,qhw->khw", probabilities, masks)


def assert_same_labels(found: torch.Tensor, expected_scores: torch.Tensor) -> None:
    """Wherever the best score leads by more than CLEAR_MARGIN, it must be the label; elsewhere, a word that near."""
    assert found.dtype == torch.int32 and found.shape == expected_scores.shape[1:]
    best = expected_scores.amax(dim=0)
    given_up = best - expected_scores.gather(0, found.long()[None])[0]
    assert given_up.max() <= CLEAR_MARGIN


def random_masks(queries: int, grid: tuple[int, int], texture: str, generator: torch.Generator) -> torch.Tensor:
    """Mask logits as of objects ("regions"), as bad as they can be ("noise"), or saturated with steep edges."""
    noise = torch.randn(queries, *grid, generator=generator)
    if texture == "noise":
        return 4 * noise
    coarse = torch.randn(1, queries, grid[0] // 4 + 1, grid[1] // 4 + 1, generator=generator)
    smooth = F.interpolate(coarse, size=grid, mode="bicubic", align_corners=False)[0]
    return smooth * 6 + noise / 4 - 3 if texture == "regions" else smooth.sign() * 30 + noise


def random_probabilities(queries: int, words: int, shape: str, generator: torch.Generator) -> torch.Tensor:
    """Class probabilities: nearly one word a query, much alike for all words, or the same for some words."""
    logits = torch.randn(queries, words + 1, generator=generator)
    logits *= {"peaked": 8.0, "flat": 0.1, "ties": 2.0}[shape]
    found = logits.softmax(dim=1)[:, :-1]
    return found[:, torch.arange(words) // 2 * 2 % words] if shape == "ties" else found


CASES = [
    ImageSizes(image=(64, 96), network=(64, 96), padded=(64, 96)),
    ImageSizes(image=(131, 77), network=(61, 90), padded=(64, 96)),
    ImageSizes(image=(1, 300), network=(33, 96), padded=(64, 96)),
    ImageSizes(image=(40, 31), network=(64, 65), padded=(64, 96)),
    ImageSizes(image=(5, 3), network=(64, 96), padded=(64, 96)),
]


@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_labels_and_scores_equal_the_plain_computation(sizes, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(12, 4, 6, generator=generator) * 4
    probabilities = torch.rand(12, 5, generator=generator).softmax(dim=-1)
    expected = plain_scores(masks, probabilities, sizes)
    torch.testing.assert_close(score_maps(masks, probabilities, sizes), expected, atol=1e-5, rtol=1e-5)

    seven_rows = 7 * sizes.image[1] * 17  # a band of so many: many bands, a short last one
    monkeypatch.setattr(labels, "BAND_FLOATS", seven_rows)
    monkeypatch.setattr(scores, "BAND_FLOATS", seven_rows)
    found = label_map_by_bands(masks, probabilities, sizes)
    assert_same_labels(found, expected)
    assert_same_labels(label_map_by_bounds(masks, probabilities, sizes), expected)
    best = expected.amax(dim=0)
    torch.testing.assert_close(label_scores(masks, probabilities, sizes, found), best, atol=1e-4, rtol=0)


@st.composite
def axes(draw) -> tuple[int, int, int]:
    """(image, network, padded) pixels of an axis: enlarged or reduced, padded by less than the divisor or more."""
    padded = 32 * draw(st.integers(1, 4))
    network = draw(st.integers(max(1, padded - 60), padded))
    return draw(st.integers(1, 150)), network, padded


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    rows=axes(),
    columns=axes(),
    cell=st.sampled_from([8, 16]),
    queries=st.integers(1, 40),
    words=st.sampled_from([1, 2, 3, 20, 65, 130]),
    texture=st.sampled_from(["regions", "noise", "steep"]),
    shape=st.sampled_from(["peaked", "flat", "ties"]),
    small=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
def test_blocks_decide_as_every_pixel_would(rows, columns, cell, queries, words, texture, shape, small, seed):
    sizes = ImageSizes(*zip(rows, columns, strict=True))
    generator = torch.Generator().manual_seed(seed)
    masks = random_masks(queries, (rows[2] // cell, columns[2] // cell), texture, generator)
    probabilities = random_probabilities(queries, words, shape, generator)
    with pytest.MonkeyPatch.context() as patch:
        if small:  # many bands, chunks, and divisions
            patch.setattr(labels, "BAND_PIXELS", 5000)
            patch.setattr(labels, "CHUNK_FLOATS", 20_000)
            patch.setattr(labels, "SMALL_BLOCK", 16)
            patch.setattr(labels, "MOST_CANDIDATES", 8)
        found = label_map_by_bounds(masks, probabilities, sizes)
    expected = plain_scores(masks, probabilities, sizes)
    for labelled in (found, label_map_by_bands(masks, probabilities, sizes), label_map(masks, probabilities, sizes)):
        assert_same_labels(labelled, expected)
        if shape == "ties":  # every second word is the one before it
            assert (labelled % 2 == 0).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(axis=axes(), cell=st.sampled_from([8, 16]))
def test_matrices_are_what_torch_resizes_with(axis, cell):
    """To the last bit where torch multiplies and adds at once; a processor may do otherwise."""
    image, network, padded = axis
    identity = torch.eye(padded // cell).unsqueeze(0)
    at_padded = F.interpolate(identity, size=padded, mode="linear", align_corners=False)
    expected = F.interpolate(at_padded[..., :network], size=image, mode="linear", align_corners=False)[0].T
    found = torch.from_numpy(interpolation_matrix(padded // cell, padded, network, image))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(axis=axes(), cell=st.sampled_from([8, 16]))
def test_pieces_cover_an_axis_and_are_linear(axis, cell):
    image, network, padded = axis
    first, last = linear_pieces(padded // cell, padded, network, image)
    pixels = [torch.arange(a, b + 1) for a, b in zip(first, last, strict=True)]
    assert torch.equal(torch.cat(pixels), torch.arange(image))
    rows = torch.from_numpy(interpolation_matrix(padded // cell, padded, network, image))
    for a, b in zip(first.tolist(), last.tolist(), strict=True):
        between = torch.linspace(0, 1, b - a + 1)[:, None]
        torch.testing.assert_close(rows[a : b + 1], torch.lerp(rows[a], rows[b], between), atol=1e-4, rtol=0)


@pytest.mark.parametrize("spread", [0.1, 1, 5, 30])
def test_masks_stray_no_further_than_their_bound(spread):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(500, 2, 2, 8, generator=generator) * spread
    logits += torch.randn(500, 1, 1, 8, generator=generator) * 3
    steps = logits.diff(dim=1).abs().amax(dim=(1, 2)) ** 2 + logits.diff(dim=2).abs().amax(dim=(1, 2)) ** 2
    bound = mask_errors(logits.sigmoid(), steps[:, None, None])
    t = torch.linspace(0, 1, 33)
    share = torch.stack([1 - t, t], dim=1)
    between = torch.einsum("ai,bj,nijq->nabq", share, share, logits).sigmoid()
    strays = (between - torch.einsum("ai,bj,nijq->nabq", share, share, logits.sigmoid())).abs()
    assert (strays <= bound + 1e-6).all()
    if spread <= 1:  # and the bound is of use: no more than some times the truth
        assert bound.mean() < 4 * strays.amax(dim=(1, 2)).mean()


@pytest.mark.parametrize("words", [1, 7, 64, 128, 256])
def test_first_maximum_is_the_first(words):
    values = torch.randint(0, 5, (2, words, 50), generator=torch.Generator().manual_seed(0)).float()
    expected = (values == values.amax(dim=1, keepdim=True)).int().argmax(dim=1)
    assert torch.equal(first_maximum(values), expected)


@pytest.mark.parametrize("method", [label_map, label_map_by_bands, label_map_by_bounds])
def test_ties_go_to_the_first_word(method):
    sizes = ImageSizes((8, 8), (32, 32), (32, 32))
    found = method(torch.zeros(3, 2, 2), torch.full((3, 4), 0.25), sizes)
    assert (found == 0).all()


@pytest.mark.parametrize(
    ("texture", "words", "by_bands"), [("noise", 40, True), ("regions", 40, False), ("noise", 301, False)]
)
def test_what_bounds_cannot_decide_is_computed_by_bands(texture, words, by_bands, monkeypatch):
    """On noise, few words are sooner computed than bounded; the labels are the same either way."""
    generator = torch.Generator().manual_seed(0)
    masks = random_masks(20, (8, 8), texture, generator)
    probabilities = random_probabilities(20, words, "flat" if texture == "noise" else "peaked", generator)
    sizes = ImageSizes((64, 64), (64, 64), (64, 64))
    expected = label_map_by_bands(masks, probabilities, sizes)
    used, original = [], labels.best_words_of_masks
    monkeypatch.setattr(labels, "best_words_of_masks", lambda *given: used.append(given) or original(*given))
    monkeypatch.setattr(labels, "BAND_PIXELS", 2000)  # several bands of blocks
    found = label_map(masks, probabilities, sizes)
    assert (len(used) > 1) == by_bands
    assert (found == expected).float().mean() > 0.999


def test_most_blocks_are_decided_whole(monkeypatch):
    """The reason for bounds: with masks of objects and words that are told apart, few pixels are computed."""
    generator = torch.Generator().manual_seed(0)
    masks = random_masks(50, (20, 20), "regions", generator)
    probabilities = random_probabilities(50, 200, "peaked", generator)
    computed = []
    original = labels._Labeller._label_pixels
    monkeypatch.setattr(
        labels._Labeller,
        "_label_pixels",
        lambda self, blocks, candidates: (
            computed.append(int(blocks.size.prod(dim=1).sum())) or original(self, blocks, candidates)
        ),
    )
    label_map(masks, probabilities, ImageSizes((320, 320), (320, 320), (320, 320)))
    assert 0 < sum(computed) < 0.35 * 320 * 320


def test_memory_does_not_grow_with_words_times_pixels():
    """847 words at 3000x2000 would be a 20 GB tensor; one band of rows is all that is ever made."""
    sizes = ImageSizes((3000, 2000), (640, 427), (640, 448))
    found = label_map(torch.randn(2, 40, 28), torch.rand(2, 847), sizes)
    assert found.shape == (3000, 2000)


@pytest.mark.filterwarnings("error")
def test_mask_probabilities_are_those_of_float64_even_far_from_0():
    logits = np.concatenate([np.linspace(-30, 30, 601), [-1000, -104, -89, 89, 1000]])
    found = masks_at(logits.astype(np.float32)[:, None, None], ImageSizes((1, 1), (1, 1), (1, 1)), 0, 0)
    assert found.dtype == np.float32
    exact = torch.from_numpy(logits.astype(np.float32)).double().sigmoid().numpy()
    np.testing.assert_allclose(found, exact, rtol=3e-7, atol=1e-37)
