"""The two halves of the model, and what the structure promises."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from opensan.checkpoints import build_empty
from opensan.checkpoints.presets import PRESETS
from opensan.model.maps import adaptive_max_pool, resize_position_table
from opensan.model.transformer import SideBlock
from opensan.structures import TextClassifier


def pixels(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(count: int, width: int, seed: int = 2) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def plain_classifier(text: torch.Tensor) -> TextClassifier:
    return TextClassifier(text, torch.arange(len(text)), len(text))


@torch.inference_mode()
def test_shapes_and_unit_length(small_model):
    proposals = small_model.propose(pixels(2, 3, 96, 128))
    assert proposals.mask_logits.shape == (2, 10, 6, 8)
    assert proposals.attention_bias.shape == (2, 4, 10, 6, 8)
    assert proposals.mask_embeddings.shape == (2, 10, 24)
    torch.testing.assert_close(proposals.mask_embeddings.norm(dim=-1), torch.ones(2, 10))
    assert proposals.auxiliary == ()
    logits = small_model.classify(proposals, plain_classifier(rows(5, 24)))
    assert logits.shape == (2, 10, 6)


@torch.inference_mode()
def test_words_run_neither_vit(small_model):
    """Asking other words touches no parameter of either ViT: only the text rows and the no-object row."""
    proposals = small_model.propose(pixels(1, 3, 96, 96))
    calls = []
    hooks = [m.register_forward_hook(lambda *_: calls.append(1)) for m in small_model.modules() if m is not small_model]
    try:
        first = small_model.classify(proposals, plain_classifier(rows(4, 24, seed=3)))
        second = small_model.classify(proposals, plain_classifier(rows(7, 24, seed=4)))
        assert calls == []
        small_model.propose(pixels(1, 3, 96, 96))
        assert calls, "the hooks would have seen the ViTs run"
    finally:
        for hook in hooks:
            hook.remove()
    assert first.shape[-1] == 5 and second.shape[-1] == 8


@torch.inference_mode()
def test_supervision_adds_blocks_and_changes_no_answer(small_model):
    x = pixels(1, 3, 64, 96)
    plain, supervised = small_model.propose(x), small_model.propose(x, supervise=True)
    torch.testing.assert_close(plain.mask_logits, supervised.mask_logits)
    torch.testing.assert_close(plain.mask_embeddings, supervised.mask_embeddings)
    (auxiliary,) = supervised.auxiliary
    assert auxiliary.mask_logits.shape == plain.mask_logits.shape
    assert not torch.allclose(auxiliary.mask_logits, plain.mask_logits)


@torch.inference_mode()
def test_patches_and_class_token_behave_as_in_plain_clip(small_model):
    """The Q SLS tokens change nothing for the others, and one whose bias is zero is CLIP's own class token."""
    visual = small_model.clip.visual
    features = small_model.shallow_features(pixels(1, 3, 128, 128))
    assert features.grid == (8, 8)
    x = features.tokens
    steered = torch.cat([x[:, :1].expand(-1, 3, -1), x], dim=1)
    for block in visual.transformer.resblocks[3:]:
        x = block(x)
        steered = block(steered, steering=torch.zeros(1, 4, 3, 64))
    torch.testing.assert_close(steered[:, 3:], x, atol=1e-5, rtol=1e-5)
    # CLIP's class token sees itself and the patches, and so does an SLS token
    torch.testing.assert_close(steered[:, 0], x[:, 0], atol=1e-5, rtol=1e-5)


def official_mask(steering: torch.Tensor) -> torch.Tensor:
    """One additive mask for all tokens, [B, N, Q + 1 + L, Q + 1 + L], as the official code writes recognition."""
    batch, heads, queries, patches = steering.shape
    mask = steering.new_zeros(batch, heads, queries + 1 + patches, queries + 1 + patches)
    mask[..., : queries + 1] = -100.0
    mask[..., queries:, queries] = 0.0
    mask[..., range(queries), range(queries)] = 0.0
    mask[..., :queries, queries + 1 :] = steering
    return mask


def test_a_steered_block_is_one_with_the_official_mask(small_model):
    """Answers and gradients, of input and bias; and the last block's queries alone are those of the whole block."""
    block = copy.deepcopy(small_model.clip.visual.transformer.resblocks[3]).double()
    x = pixels(2, 7 + 1 + 12, 32).double().requires_grad_()
    steering = (3 * pixels(2, 4, 7, 12, seed=2)).double().requires_grad_()
    towards = pixels(2, 20, 32, seed=3).double()
    expected = block(x, attn_mask=official_mask(steering))
    expected_gradients = torch.autograd.grad((expected * towards).sum(), (x, steering))
    found = block(x, steering=steering)
    found_gradients = torch.autograd.grad((found * towards).sum(), (x, steering))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found_gradients, expected_gradients, atol=1e-12, rtol=1e-12)
    only = block(x, steering=steering, only_queries=True)
    torch.testing.assert_close(only, expected[:, :7], atol=1e-12, rtol=1e-12)


@torch.inference_mode()
def test_recognition_pools_the_bias_to_clips_grid(small_model):
    """Two biases with the same maximum in each patch of CLIP's grid recognise alike; another maximum does not."""
    features = small_model.shallow_features(pixels(1, 3, 128, 128))
    bias = 3 * pixels(1, 4, 5, 16, 16)
    highest = F.max_pool2d(bias[0], 2).unsqueeze(0).repeat_interleave(2, -1).repeat_interleave(2, -2)
    first, second, other = (small_model.clip.recognise(features, b) for b in (bias, highest, bias / 2))
    torch.testing.assert_close(first, second)
    assert (first - other).abs().max() > 1e-3


def test_position_table_resizes_whenever_the_shape_differs():
    """The official code leaves a 2x8 grid of a 4x4 table alone because the number of patches is the same: a bug."""
    table = torch.arange(16.0).reshape(16, 1)
    assert resize_position_table(table, (4, 4)) is table
    resized = resize_position_table(table, (2, 8))
    assert resized.shape == (16, 1) and not torch.equal(resized, table)


@torch.inference_mode()
def test_batches_answer_as_single_images(small_model):
    x = pixels(3, 3, 64, 96)
    together = small_model.propose(x)
    for index in range(3):
        alone = small_model.propose(x[index : index + 1])
        torch.testing.assert_close(together.mask_logits[index], alone.mask_logits[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.mask_embeddings[index], alone.mask_embeddings[0], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_class_scores_as_its_best_synonym(small_model):
    proposals = small_model.propose(pixels(1, 3, 64, 64))
    text = rows(5, 24)
    each = small_model.classify(proposals, plain_classifier(text))
    grouped = small_model.classify(proposals, TextClassifier(text, torch.tensor([0, 0, 1, 2, 2]), 3))
    expected = torch.stack([each[..., :2].amax(-1), each[..., 2], each[..., 3:5].amax(-1), each[..., 5]], dim=-1)
    torch.testing.assert_close(grouped, expected)


@torch.inference_mode()
def test_prompts_may_be_cut_after_the_longest(small_model):
    tokens = torch.zeros(2, 77, dtype=torch.int64)
    tokens[0, :4] = torch.tensor([49406, 320, 1125, 49407])
    tokens[1, :6] = torch.tensor([49406, 320, 1125, 539, 320, 49407])
    full, cut = small_model.clip.embed_prompts(tokens), small_model.clip.embed_prompts(tokens[:, :6])
    torch.testing.assert_close(full, cut, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(full.norm(dim=-1), torch.ones(2))


def test_the_towers_are_open_clips(small_model):
    """Same weights under the same names, same numbers."""
    model = pytest.importorskip("open_clip.model")
    config = small_model.config.clip
    theirs = model.CLIP(
        config.embed_dim,
        {"width": 32, "layers": 5, "head_width": 8, "patch_size": 8, "image_size": 64},
        {"width": 16, "layers": 2, "heads": 2},
        quick_gelu=True,
    ).eval()
    theirs.load_state_dict(small_model.clip.state_dict(), strict=True)
    tokens = torch.zeros(1, 77, dtype=torch.int64)
    tokens[0, :4] = torch.tensor([49406, 320, 1125, 49407])
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs.encode_text(tokens, normalize=True)
        torch.testing.assert_close(small_model.clip.embed_prompts(tokens), expected, atol=1e-6, rtol=1e-5)
        visual = small_model.clip.visual
        class_token = small_model.clip.shallow_features(pixels, config.vision.layers, ()).tokens[:, 0]
        expected = theirs.encode_image(pixels)
        torch.testing.assert_close(visual.ln_post(class_token) @ visual.proj, expected, atol=1e-5, rtol=1e-5)


def test_the_side_networks_block_is_timms():
    timm = pytest.importorskip("timm.models.vision_transformer")
    ours = SideBlock(48, 3, 4.0, 1e-6)
    theirs = timm.Block(48, 3, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 30, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("preset", "total", "trained"),
    [("san-vit-b16", 157_840_307, 8_370_866), ("san-vit-l14", 436_674_995, 9_321_650)],
)
def test_presets_have_the_official_size(preset, total, trained):
    model = build_empty(PRESETS[preset].config)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


def test_training_mode_leaves_clip_frozen(small_model):
    try:
        small_model.train()
        assert small_model.side_adapter.training and not small_model.clip.training
    finally:
        small_model.eval()


def test_autocast_on_a_cpu_answers_nearly_the_same_with_and_without_gradients(small_model):
    pixels = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    plain = small_model.propose(pixels).mask_embeddings
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", dtype=torch.bfloat16):
            found = small_model.propose(pixels).mask_embeddings
        assert 0 < (found.float() - plain).abs().max() < 0.05


@pytest.mark.parametrize("grid", [(20, 20), (40, 20), (10, 40), (40, 40), (24, 13)])
def test_maximum_of_windows_is_max_pooling(grid):
    maps = torch.randn(3, 5, 40, 40, generator=torch.Generator().manual_seed(0))
    maps[0, 0, 3, 3] = torch.nan
    expected = adaptive_max_pool(maps.requires_grad_(), grid)
    assert expected.requires_grad
    with torch.inference_mode():
        found = adaptive_max_pool(maps.detach(), grid)
    assert torch.equal(found.nan_to_num(9), expected.nan_to_num(9))
    assert torch.equal(found.nan_to_num(9), torch.nn.functional.adaptive_max_pool2d(maps, grid).nan_to_num(9))
