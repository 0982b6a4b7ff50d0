"""A small model of each family of encoders, with random weights, for tests."""

import pytest
import torch

from opensan.config import (
    AlignConfig,
    AlignTextConfig,
    AlignVisionConfig,
    ClipResNetConfig,
    ConvNetConfig,
    ConvNetVisionConfig,
    EfficientNetLiteConfig,
    EvaClipConfig,
    EvaVisionConfig,
    ImageConfig,
    ModelConfig,
    PooledVitConfig,
    PooledVitVisionConfig,
    ResNetVisionConfig,
    SideAdapterConfig,
    SiglipTextConfig,
    TextConfig,
)
from opensan.model import SAN, build_san

timm = pytest.importorskip("timm")
pytest.importorskip("open_clip")
pytest.importorskip("transformers")

SIDE = SideAdapterConfig(
    width=48,
    depth=4,
    heads=3,
    image_size=96,
    queries=10,
    fusion={0: 1, 1: 2, 2: 3},
    supervised_blocks=(3, 4),
    mask_channels=20,
    mlp_channels=28,
)
TEXT = TextConfig(width=16, layers=2, heads=2, context_length=32)


@timm.models.register_model
def eva02_small_clip_of_tests(
    pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **options
):
    """Make an EVA02 with the options of eva02_base_patch16_clip_224, and less of everything."""
    return timm.models.eva.Eva(
        img_size=64,
        embed_dim=48,
        depth=4,
        num_heads=3,
        qkv_fused=False,
        mlp_ratio=4 * 2 / 3,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(16, 16),
        **options,
    )


CLIPS = {
    "clip_resnet": ClipResNetConfig(
        kind="clip_resnet",
        embed_dim=24,
        quick_gelu=True,
        vision=ResNetVisionConfig(layers=(1, 2, 1, 1), width=8, image_size=64),
        text=TEXT,
    ),
    "siglip": PooledVitConfig(
        kind="vit_pooled",
        embed_dim=64,
        vision=PooledVitVisionConfig(model="test_vit", layers=6, projection=False),
        text=SiglipTextConfig(kind="siglip_text", width=16, layers=2, heads=2, context_length=32, vocab_size=49_408),
    ),
    "perception encoder": PooledVitConfig(
        kind="vit_pooled",
        embed_dim=24,
        vision=PooledVitVisionConfig(model="vit_pe_core_tiny_patch16_384", layers=12, projection=True),
        text=TEXT,
    ),
    "eva": EvaClipConfig(
        kind="eva_clip",
        embed_dim=24,
        vision=EvaVisionConfig(model="eva02_small_clip_of_tests", layers=4),
        text=TEXT,
    ),
    "convnext": ConvNetConfig(
        kind="convnet",
        embed_dim=24,
        vision=ConvNetVisionConfig(model="test_convnext", layers=4, head="linear"),
        text=TEXT,
    ),
    "convnext mlp": ConvNetConfig(
        kind="convnet",
        embed_dim=24,
        vision=ConvNetVisionConfig(model="test_convnext", layers=4, head="mlp"),
        text=TEXT,
    ),
    "align": AlignConfig(
        kind="align",
        embed_dim=80,
        vision=AlignVisionConfig(width_coefficient=0.25, depth_coefficient=0.5, image_size=64),
        text=AlignTextConfig(
            width=16, layers=2, heads=2, mlp_channels=20, positions=32, context_length=32, vocab_size=49_408
        ),
    ),
    "efficientnet_lite": EfficientNetLiteConfig(
        kind="efficientnet_lite", variant="lite0", embed_dim=32, text=TEXT.model_copy(update={"causal": False})
    ),
}


def layers_of(clip) -> int:
    """Count the shallow layers: all but one of EVA-CLIP's."""
    fixed = {"clip_resnet": 4, "efficientnet_lite": 3}
    return fixed.get(clip.kind) or clip.vision.layers - (clip.kind == "eva_clip")


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


def small_san(name: str) -> SAN:
    """Build a small SAN around the encoder `name` of CLIPS, with a tokenizer if it needs its own."""
    clip = CLIPS[name]
    config = ModelConfig(
        name=name,
        clip=clip,
        side_adapter=SIDE,
        recognition_layer=layers_of(clip),
        clip_scale=1.0,
        image=ImageConfig(short_side=96, long_side=384),
    )
    model = lively(build_san(config))
    if clip.text.own_tokenizer:
        model.tokenizer = small_tokenizer()
    return model


def small_tokenizer() -> bytes:
    """A tokenizer.json of a few words, whose prompts end with 1."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "</s>": 1, "a": 2, "photo": 3, "of": 4, "sky": 5, "grass": 6, "road": 7, "the": 8}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer.to_str().encode()
