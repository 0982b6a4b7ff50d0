"""Backbones of other families, each against the library that it comes from, with random weights."""

import pytest
import torch
import torch.nn.functional as F

from opensan.checkpoints import load_folder, save_folder
from opensan.config import (
    ClipResNetConfig,
    ImageConfig,
    ModelConfig,
    ResNetVisionConfig,
    SideAdapterConfig,
    TextConfig,
)
from opensan.model import build_san
from opensan.model.backbones import build_backbone

pytest.importorskip("open_clip")

SIDE = SideAdapterConfig(
    width=48,
    depth=4,
    heads=3,
    image_size=96,
    queries=10,
    fusion={0: 0, 1: 1, 2: 3},
    supervised_blocks=(3, 4),
    mask_channels=20,
    mlp_channels=28,
)

RESNET = ClipResNetConfig(
    kind="clip_resnet",
    embed_dim=24,
    quick_gelu=True,
    vision=ResNetVisionConfig(layers=(1, 2, 1, 1), width=8, image_size=64),
    text=TextConfig(width=16, layers=2, heads=2, context_length=16),
)
CLIPS = {"clip_resnet": (RESNET, 4)}


def lively(module: torch.nn.Module) -> torch.nn.Module:
    """`module` with seeded weights and running statistics, of which none is zero."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif tensor.is_floating_point() and tensor.ndim:
            scale = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1
            base = 1.0 if tensor.ndim == 1 and name.endswith("weight") else 0.0
            tensor.copy_(base + scale * torch.randn(tensor.shape, generator=generator))
    return module.eval()


@pytest.fixture(scope="module", params=list(CLIPS))
def family(request):
    """A small SAN of each family. Not to be changed."""
    clip, layers = CLIPS[request.param]
    config = ModelConfig(
        name=request.param,
        clip=clip,
        side_adapter=SIDE,
        recognition_layer=layers,
        clip_scale=1.0,
        image=ImageConfig(short_side=96, long_side=384),
    )
    return lively(build_san(config))


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_a_resnet_is_open_clips():
    model = pytest.importorskip("open_clip.model")
    ours = lively(build_backbone(RESNET))
    theirs = model.CLIP(
        24,
        {"layers": [1, 2, 1, 1], "width": 8, "image_size": 64, "head_width": 64},
        {"width": 16, "layers": 2, "heads": 2, "context_length": 16},
        quick_gelu=True,
    ).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = pixels(2, 3, 64, 64)
    features = ours.shallow_features(images, 4, ())
    found = ours.recognise(features, torch.zeros(2, ours.attention_heads, 3, 8, 8))
    expected = theirs.encode_image(images, normalize=True).unsqueeze(1).expand(-1, 3, -1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    tokens = torch.tensor([[49406, 320, 1125, 49407, 0], [49406, 320, 49407, 0, 0]])
    padded = F.pad(tokens, (0, 11))
    torch.testing.assert_close(
        ours.embed_prompts(tokens), theirs.encode_text(padded, normalize=True), atol=1e-5, rtol=0
    )


@torch.inference_mode()
def test_the_bias_steers_recognition(family):
    """A query that sees one half of an image recognises what it recognises on an image with the same half."""
    first, second = pixels(2, 1, 3, 128, 128)
    clip, layers = family.clip, family.config.recognition_layer
    features = clip.shallow_features(torch.cat([first, second]), layers, ())
    bias = torch.zeros(2, clip.attention_heads, 2, 16, 16)
    bias[:, :, 1, :, 8:] = -50.0
    found = clip.recognise(features, bias)
    assert found.shape == (2, 2, family.config.clip.embed_dim)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2, 2))
    assert (found[:, 0] - found[:, 1]).abs().max() > 1e-4, "the bias changes what is recognised"


def test_a_training_step_changes_what_is_trained_and_nothing_else(family, tmp_path):
    model = load_folder(save_folder(family, tmp_path / "model"))
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = model.trained()
    optimizer = torch.optim.SGD([one.parameter for one in trained], lr=1.0)
    proposals = model.propose(pixels(2, 3, 96, 128), supervise=True)
    (proposals.mask_embeddings.square() * torch.arange(10.0).view(1, 10, 1)).sum().backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and changed <= {one.name for one in trained}


@torch.inference_mode()
def test_saved_and_loaded_models_answer_alike(family, tmp_path):
    again = load_folder(save_folder(family, tmp_path / "model"))
    images = pixels(1, 3, 96, 160)
    found, expected = again.propose(images), family.propose(images)
    torch.testing.assert_close(found.mask_logits, expected.mask_logits, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found.mask_embeddings, expected.mask_embeddings, atol=1e-5, rtol=1e-5)
