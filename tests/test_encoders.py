"""Backbones of other families, each against the library that it comes from, with random weights."""

import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from opensan.checkpoints import build_empty, load_folder, save_folder
from opensan.checkpoints.clip_weights import san_around_clip
from opensan.checkpoints.presets import PRESETS
from opensan.config import ModelConfig
from opensan.errors import UserError
from opensan.evaluation.cost import profile
from opensan.model import SAN
from opensan.model.backbones import build_backbone
from opensan.model.backbones.eva_clip import EvaClip
from opensan.segmenters.san import SanSegmenter
from opensan.vocabulary import Vocabulary

from .encoders import CLIPS, SIDE, layers_of, lively, small_san, small_tokenizer


@pytest.fixture(scope="module", params=list(CLIPS))
def family(request) -> SAN:
    """A small SAN of each family. Not to be changed."""
    return small_san(request.param)


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def recognised(ours, images: torch.Tensor, bias: float = 0.0) -> torch.Tensor:
    """What a bias that is equal everywhere recognises, [B, 3, D]."""
    layers = max(ours.layer_widths) - isinstance(ours, EvaClip)
    features = ours.shallow_features(images, layers, ())
    return ours.recognise(features, torch.full((len(images), ours.attention_heads, 3, 8, 8), bias))


def check(ours, images, expected_images, tokens, expected_texts) -> None:
    """Compare unit embeddings of images and texts; pytest -rP shows the largest differences (docs/encoders.md)."""
    expected_images = F.normalize(expected_images, dim=-1).unsqueeze(1).expand(-1, 3, -1)
    expected_texts = F.normalize(expected_texts, dim=-1)
    images, texts = recognised(ours, images), ours.embed_prompts(tokens)
    differences = [float((a - b).abs().max()) for a, b in ((images, expected_images), (texts, expected_texts))]
    print("largest differences: images {:.1e}, texts {:.1e}".format(*differences))
    torch.testing.assert_close(images, expected_images, atol=1e-5, rtol=0)
    torch.testing.assert_close(texts, expected_texts, atol=1e-5, rtol=0)


PROMPTS = torch.tensor([[49406, 320, 1125, 49407, 0], [49406, 320, 49407, 0, 0]])
PADDED = F.pad(PROMPTS, (0, 27))
CLIP_TEXT = {"width": 16, "layers": 2, "heads": 2, "context_length": 32}


@torch.inference_mode()
def test_a_resnet_is_open_clips():
    model = pytest.importorskip("open_clip.model")
    ours = lively(build_backbone(CLIPS["clip_resnet"]))
    vision = {"layers": [1, 2, 1, 1], "width": 8, "image_size": 64, "head_width": 64}
    theirs = model.CLIP(24, vision, CLIP_TEXT, quick_gelu=True).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = pixels(2, 3, 64, 64)
    check(ours, images, theirs.encode_image(images), PROMPTS, theirs.encode_text(PADDED))


@torch.inference_mode()
def test_siglip_is_open_clips():
    model = pytest.importorskip("open_clip.model")
    ours = lively(build_backbone(CLIPS["siglip"]))
    vision = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"}
    text = CLIP_TEXT | {
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    }
    theirs = model.CustomTextCLIP(64, vision, text, init_logit_bias=-10).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = pixels(2, 3, 160, 160)
    padded = F.pad(PROMPTS, (0, 27), value=1)
    check(ours, images, theirs.encode_image(images), padded, theirs.encode_text(padded))
    torch.testing.assert_close(recognised(ours, images, 7.0), recognised(ours, images), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_perception_encoder_is_open_clips():
    model = pytest.importorskip("open_clip.model")
    ours = lively(build_backbone(CLIPS["perception encoder"]))
    name = "vit_pe_core_tiny_patch16_384"
    vision = {"image_size": 384, "timm_model_name": name, "timm_pool": "map", "timm_proj": None}
    theirs = model.CustomTextCLIP(24, vision, CLIP_TEXT).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = pixels(1, 3, 384, 384)
    check(ours, images, theirs.encode_image(images), PROMPTS, theirs.encode_text(PADDED))


@torch.inference_mode()
def test_an_eva_clip_is_open_clips():
    """Wherever its blocks are cut in shallow ones and those that recognise."""
    model = pytest.importorskip("open_clip.model")
    ours = lively(build_backbone(CLIPS["eva"]))
    vision = {"image_size": 64, "timm_model_name": "eva02_small_clip_of_tests", "timm_pool": "token", "timm_proj": None}
    theirs = model.CustomTextCLIP(24, vision, CLIP_TEXT).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = pixels(2, 3, 64, 64)
    check(ours, images, theirs.encode_image(images), PROMPTS, theirs.encode_text(PADDED))
    expected = F.normalize(theirs.encode_image(images), dim=-1).unsqueeze(1).expand(-1, 3, -1)
    for layers in (1, 2, 3):
        features = ours.shallow_features(images, layers, ())
        found = ours.recognise(features, torch.zeros(2, 3, 3, 8, 8))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_convnext_is_open_clips(head):
    model = pytest.importorskip("open_clip.model")
    ours = lively(build_backbone(CLIPS["convnext" if head == "linear" else "convnext mlp"]))
    vision = {"image_size": 160, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": head}
    theirs = model.CLIP(24, vision, CLIP_TEXT).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = pixels(2, 3, 160, 160)
    check(ours, images, theirs.encode_image(images), PROMPTS, theirs.encode_text(PADDED))
    torch.testing.assert_close(recognised(ours, images, -3.0), recognised(ours, images), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_align_is_transformers():
    ours = lively(build_backbone(CLIPS["align"]))
    images = pixels(2, 3, 64, 64)
    theirs = ours.model
    found = theirs(input_ids=PADDED, attention_mask=(PADDED != 0).long(), pixel_values=images)
    check(ours, images, found.image_embeds, PROMPTS, found.text_embeds)
    torch.testing.assert_close(
        found.logits_per_text, ours.logit_scale.exp() * found.text_embeds @ found.image_embeds.T, atol=1e-3, rtol=1e-4
    )
    torch.testing.assert_close(recognised(ours, images, -3.0), recognised(ours, images), atol=1e-5, rtol=0)


@torch.inference_mode()
def test_the_bias_steers_recognition(family):
    """Queries that look elsewhere recognise something else; the size of the image is free."""
    clip, layers = family.clip, family.config.recognition_layer
    features = clip.shallow_features(pixels(2, 3, 100, 140), layers, ())
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
    (proposals.mask_embeddings * pixels(2, 10, proposals.mask_embeddings.shape[2])).sum().backward()
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


def test_images_are_labelled(family):
    """From pixels to words, by a tower that is read through the prompt tree or not."""
    segmenter = SanSegmenter(family, text_cache=False)
    image = torch.randint(0, 256, (70, 90, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    found = segmenter.segment(image, ["sky", "grass", "road"])
    assert found.labels.shape == (70, 90)
    rows = segmenter.text.rows(found.vocabulary)
    one_by_one = [segmenter.text.rows(Vocabulary.parse([word]))[0] for word in ("sky", "grass", "road")]
    assert abs(rows - one_by_one).max() < 1e-5, "a row does not depend on what is embedded beside it"


def test_a_model_without_memory_counts_the_same_parameters(family):
    empty = build_empty(family.config)
    shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in family.state_dict().items()}


def test_a_profile_counts_each_tower_as_its_own(family, tmp_path):
    """By the sizes of the modules themselves, whose names differ from family to family."""
    clip = family.clip
    if family.config.name == "align":
        text = [clip.model.text_model, clip.model.text_projection]
    elif family.config.clip.kind in ("vit_pooled", "eva_clip"):
        text = [clip.text]
    else:
        text = [clip.token_embedding, clip.transformer, clip.ln_final]
    expected = sum(parameter.numel() for module in text for parameter in module.parameters())
    if family.config.clip.kind in ("clip_resnet", "convnet", "efficientnet_lite"):
        expected += clip.positional_embedding.numel() + clip.text_projection.numel()
    costs = profile(str(save_folder(family, tmp_path / "model")), size=(96, 128), words=5)
    parameters = costs.parameters
    assert parameters["CLIP text tower"].total == expected
    whole = sum(parameter.numel() for parameter in clip.parameters())
    assert parameters["CLIP image tower"].total == whole - expected
    assert parameters["all"].total == sum(parameter.numel() for parameter in family.parameters())
    for part in ("CLIP, shallow layers", "side adapter: blocks", "side adapter: heads", "classification"):
        assert costs.multiply_adds[part] > 0, part
    assert costs.speed.images_per_second > 0


@pytest.mark.parametrize("name", ["clip_resnet", "siglip", "eva", "convnext", "align"])
def test_weights_are_read_from_the_librarys_files_strictly_by_name(name, tmp_path):
    """A missing, surplus or misshapen key stops with its name; the tokenizer comes along."""
    clip = CLIPS[name]
    config = ModelConfig(name=name, clip=clip, side_adapter=SIDE, recognition_layer=layers_of(clip))
    backbone = lively(build_backbone(clip))
    library = backbone.model if name == "align" else backbone  # what the library itself saves
    state = {key: tensor.clone() for key, tensor in library.state_dict().items()}
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    if clip.text.own_tokenizer:
        with pytest.raises(UserError, match=r"tokenizer\.json: this model's text tower needs"):
            san_around_clip(config, path)
        (tmp_path / "tokenizer.json").write_bytes(small_tokenizer())
    found = san_around_clip(config, path)
    for key, tensor in backbone.state_dict().items():
        assert torch.equal(found.clip.state_dict()[key], tensor), key
    assert (found.tokenizer is not None) is clip.text.own_tokenizer
    missing = next(key for key in state if key.endswith("weight"))
    save_file({key: tensor for key, tensor in state.items() if key != missing}, path)
    with pytest.raises(UserError, match=f"missing {re.escape(missing)}"):
        san_around_clip(config, path)
    save_file(state | {"text.extra": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"unexpected text\.extra"):
        san_around_clip(config, path)


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.official is None])
def test_the_shapes_of_named_encoders_are_the_librarys(name):
    """Each preset builds, without memory; every layer that its fusion reads is there."""
    config = PRESETS[name].config
    model = build_empty(config)
    assert set(config.side_adapter.fusion.values()) <= set(model.clip.layer_widths)


OPEN_CLIP_NAMES = {
    "laion-vit-b16": "ViT-B-16",
    "dfn-vit-b16": "ViT-B-16-quickgelu",
    "openflamingo-vit-l14": "ViT-L-14-quickgelu",
    "openai-rn50": "RN50-quickgelu",
    "siglip-vit-b16": "ViT-B-16-SigLIP",
    "siglip2-vit-b16": "ViT-B-16-SigLIP2",
    "pe-core-b16": "PE-Core-B-16",
    "eva02-clip-b16": "EVA02-B-16",
    "laion-convnext-b": "convnext_base_w",
    "laion-convnext-l": "convnext_large_d",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPEN_CLIP_NAMES)
def test_named_encoders_have_the_keys_of_open_clips_own_models(name):
    open_clip = pytest.importorskip("open_clip")
    theirs = open_clip.create_model(OPEN_CLIP_NAMES[name], pretrained=None)
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    ours = build_empty(PRESETS[name].config).clip.state_dict()
    assert {key: tensor.shape for key, tensor in ours.items()} == shapes
