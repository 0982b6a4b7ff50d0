"""The benchmarks' plain computation gives what the official code recorded, and what ours gives."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from opensan.assemble.labels import label_map
from opensan.images import prepare
from opensan.parity.golden import golden_config, golden_model, read_golden
from opensan.structures import ImageSizes, TextClassifier
from opensan.vocabulary import Vocabulary
from plain import PlainSAN

from .conftest import GOLDENS

SIZES = ImageSizes(image=(150, 70), network=(120, 56), padded=(128, 64))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
def test_plain_answers_as_recorded(name):
    meta, arrays = read_golden(GOLDENS / f"{name}.npz")
    plain = PlainSAN(golden_model(golden_config(meta, name)))
    prepared = prepare(arrays["image"], plain.config.image, resize=False)
    sizes = replace(prepared.sizes, image=tuple(arrays["output_size"].tolist()))
    proposals = plain.propose(prepared.pixels.unsqueeze(0))
    templates = Vocabulary.parse(["x"], templates=meta["templates"]).templates
    text = plain.embed_names(meta["words"], templates)
    scores = plain.scores(proposals, text, sizes)
    best = scores.topk(2, dim=0).values
    clear = best[0] - best[1] > 1e-4
    labels = plain.label_map(proposals, text, sizes)
    assert clear.float().mean() > 0.99
    assert torch.equal(labels[clear], torch.from_numpy(arrays["labels"]).long()[clear])
    for tensor, found, limit in (
        ("mask_logits", proposals.mask_logits[0], 1e-4),
        ("attention_bias", proposals.attention_bias[0], 3e-4),
        ("mask_embeddings", proposals.mask_embeddings[0], 1e-5),
        ("text_classifier", text, 1e-6),
        ("scores", scores, 1e-4),
    ):
        steps = tuple(slice(None, None, step) for step in meta["steps"][tensor])
        expected = torch.from_numpy(arrays[f"expect/{tensor}"])
        found = found[steps][: len(expected)]  # the classifier's last row, "no object", is no word's
        assert (found - expected[: len(found)]).abs().max() < limit, tensor


@torch.inference_mode()
def test_ours_labels_as_plain(small_model):
    plain = PlainSAN(small_model)
    pixels = torch.randn(2, 3, *SIZES.padded, generator=torch.Generator().manual_seed(4))
    theirs, ours = (model.propose(pixels, supervise=True) for model in (plain, small_model))
    for a, b in zip((theirs, *theirs.auxiliary), (ours, *ours.auxiliary), strict=True):
        torch.testing.assert_close(a.mask_logits, b.mask_logits, atol=5e-5, rtol=1e-4)
        torch.testing.assert_close(a.attention_bias, b.attention_bias, atol=5e-5, rtol=1e-4)
        torch.testing.assert_close(a.mask_embeddings, b.mask_embeddings, atol=1e-5, rtol=1e-5)
    embeddings = theirs.mask_embeddings[0]
    rows = F.normalize(embeddings[:5] - embeddings.mean(dim=0), dim=-1)  # words that the proposals disagree about
    text = TextClassifier(rows, torch.arange(5), 5)
    scores = plain.scores(theirs, rows, SIZES)
    best = scores.topk(2, dim=0).values
    clear = best[0] - best[1] > 1e-4
    probabilities = small_model.classify(ours, text)[0].softmax(-1)[:, :-1]
    labels = label_map(ours.mask_logits[0], probabilities, SIZES)
    assert clear.float().mean() > 0.9 and len(labels.unique()) > 1
    assert torch.equal(labels[clear].long(), plain.label_map(theirs, rows, SIZES)[clear])
