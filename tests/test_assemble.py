"""The label map, against the official sequence of resizes written out in full."""

import pytest
import torch
import torch.nn.functional as F

from opensan import assemble
from opensan.assemble import label_map, label_scores, score_maps
from opensan.structures import ImageSizes


def plain_scores(mask_logits: torch.Tensor, probabilities: torch.Tensor, sizes: ImageSizes) -> torch.Tensor:
    """Bilinear to the padded size, crop, bilinear to the image, sigmoid, weighted sum: all at full size."""
    masks = F.interpolate(mask_logits[None], size=sizes.padded, mode="bilinear", align_corners=False)
    masks = masks[..., : sizes.network[0], : sizes.network[1]]
    masks = F.interpolate(masks, size=sizes.image, mode="bilinear", align_corners=False)[0].sigmoid()
    return torch.einsum("qk,qhw->khw", probabilities, masks)


CASES = [
    ImageSizes(image=(64, 96), network=(64, 96), padded=(64, 96)),
    ImageSizes(image=(131, 77), network=(61, 90), padded=(64, 96)),
    ImageSizes(image=(1, 300), network=(33, 96), padded=(64, 96)),
    ImageSizes(image=(40, 31), network=(64, 65), padded=(64, 96)),
]


@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_labels_and_scores_equal_the_plain_computation(sizes, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(12, 4, 6, generator=generator) * 4
    probabilities = torch.rand(12, 5, generator=generator).softmax(dim=-1)
    expected = plain_scores(masks, probabilities, sizes)
    torch.testing.assert_close(score_maps(masks, probabilities, sizes), expected, atol=1e-5, rtol=1e-5)

    monkeypatch.setattr(
        assemble, "BAND_ELEMENTS", 7 * sizes.image[1] * 17
    )  # seven rows a band: many bands, a short last one
    found = label_map(masks, probabilities, sizes)
    best = expected.topk(2, dim=0).values
    clear = best[0] - best[1] > 1e-4
    assert torch.equal(found[clear].long(), expected.argmax(dim=0)[clear])
    assert clear.float().mean() > 0.9
    torch.testing.assert_close(label_scores(masks, probabilities, sizes, found), best[0], atol=1e-5, rtol=1e-5)


def test_ties_go_to_the_first_word():
    sizes = ImageSizes((8, 8), (32, 32), (32, 32))
    found = label_map(torch.zeros(3, 2, 2), torch.full((3, 4), 0.25), sizes)
    assert (found == 0).all()


def test_memory_does_not_grow_with_words_times_pixels():
    """847 words at 3000x2000 would be a 20 GB tensor; one band of rows is all that is ever made."""
    sizes = ImageSizes((3000, 2000), (640, 427), (640, 448))
    found = label_map(torch.randn(2, 40, 28), torch.rand(2, 847), sizes)
    assert found.shape == (3000, 2000)
