"""The models that have names: the official SANs, and SANs around other encoders, which a training starts from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from opensan.config import (
    AlignConfig,
    AnyClipConfig,
    ClipConfig,
    ClipResNetConfig,
    ConvNetConfig,
    ConvNetVisionConfig,
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
    VisionConfig,
)


@dataclass(frozen=True)
class Official:
    """The files and figures that the authors of a SAN released."""

    title: str
    """The name in tables."""
    file: str
    """The name of the weights' file in their repository on the hub."""
    figures: Mapping[str, float]
    """Trained parameters ("trained"; the paper's: "paper_trained"), and multiply-adds at 640x640 without the label map,
    as the paper states them ("paper") and as their code was measured ("code")."""


@dataclass(frozen=True)
class Preset:
    """A model that has a name."""

    config: ModelConfig
    encoder_weights: str
    """The repository on the hub that holds the encoder's weights."""
    official: Official | None = None
    """None: nobody released a SAN around this encoder; one starts a training of it."""
    proved: str = "module against its library with random weights; untested with real weights here"
    """The checks that were made."""


HALF = (127.5, 127.5, 127.5)
"""Mean and deviation of encoders that read pixels in [-1, 1]."""
_TEXT_512 = TextConfig(width=512, layers=12, heads=8)
_TEXT_768 = TextConfig(width=768, layers=12, heads=12)
_VIT_B16 = VisionConfig(width=768, layers=12, heads=12, patch_size=16, image_size=224)
_VIT_L14 = VisionConfig(width=1024, layers=24, heads=16, patch_size=14, image_size=224)


def _san(
    name: str,
    clip: AnyClipConfig,
    fusion: Mapping[int, int],
    recognition_layer: int,
    clip_scale: float,
    image: ImageConfig | None = None,
) -> ModelConfig:
    return ModelConfig(
        name=name,
        clip=clip,
        side_adapter=SideAdapterConfig(fusion=dict(fusion)),
        recognition_layer=recognition_layer,
        clip_scale=clip_scale,
        image=image or ImageConfig(),
    )


def _vit_b16(name: str, *, quick_gelu: bool) -> ModelConfig:
    clip = ClipConfig(embed_dim=512, quick_gelu=quick_gelu, vision=_VIT_B16, text=_TEXT_512)
    return _san(name, clip, {0: 0, 1: 3, 2: 6, 3: 9}, 9, 0.5)


def _vit_l14(name: str, *, quick_gelu: bool, image_size: int = 224, clip_scale: float = 0.5) -> ModelConfig:
    vision = _VIT_L14.model_copy(update={"image_size": image_size})
    clip = ClipConfig(embed_dim=768, quick_gelu=quick_gelu, vision=vision, text=_TEXT_768)
    return _san(name, clip, {0: 0, 1: 6, 2: 12, 3: 18}, 18, clip_scale)


def _resnet50(name: str) -> ModelConfig:
    vision = ResNetVisionConfig(layers=(3, 4, 6, 3))
    clip = ClipResNetConfig(kind="clip_resnet", embed_dim=1024, quick_gelu=True, vision=vision, text=_TEXT_512)
    return _san(name, clip, {0: 1, 1: 2, 2: 3, 3: 4}, 4, 1.0)


def _pooled(name: str, embed_dim: int, model: str, layers: int, text: TextConfig | SiglipTextConfig) -> ModelConfig:
    vision = PooledVitVisionConfig(model=model, layers=layers, projection=isinstance(text, TextConfig))
    clip = PooledVitConfig(kind="vit_pooled", embed_dim=embed_dim, vision=vision, text=text)
    fusion = {block: block * layers // 4 for block in range(4)}
    return _san(name, clip, fusion, layers, 0.5, ImageConfig(mean=HALF, std=HALF))


def _eva(name: str, embed_dim: int, model: str, layers: int, text: TextConfig) -> ModelConfig:
    vision = EvaVisionConfig(model=model, layers=layers)
    clip = EvaClipConfig(kind="eva_clip", embed_dim=embed_dim, vision=vision, text=text)
    fusion = {block: block * layers // 4 for block in range(4)}
    return _san(name, clip, fusion, layers * 3 // 4, 0.5)


def _convnext(
    name: str, embed_dim: int, model: str, text: TextConfig, head: Literal["linear", "mlp"] = "linear"
) -> ModelConfig:
    vision = ConvNetVisionConfig(model=model, layers=4, head=head)
    clip = ConvNetConfig(kind="convnet", embed_dim=embed_dim, vision=vision, text=text)
    return _san(name, clip, {0: 1, 1: 2, 2: 3, 3: 4}, 4, 1.0)


def _align(name: str) -> ModelConfig:
    return _san(name, AlignConfig(kind="align"), {0: 2, 1: 3, 2: 4, 3: 5}, 5, 0.5, ImageConfig(mean=HALF, std=HALF))


_OFFICIAL_PROOF = "whole model against recorded answers of the official code, weights by a rule (opensan parity)"
_VIT_PROOF = "towers against open_clip with random weights; untested with real weights here"
_SIGLIP_TEXT = SiglipTextConfig(kind="siglip_text", width=768, layers=12, heads=12)
_SIGLIP2_TEXT = _SIGLIP_TEXT.model_copy(update={"vocab_size": 256_000, "padding": 0, "tanh_gelu": True})
_PE_TEXT = TextConfig(width=1024, layers=24, heads=16, context_length=32)

_PRESETS = (
    Preset(
        _vit_b16("san-vit-b16", quick_gelu=True),
        "timm/vit_base_patch16_clip_224.openai",
        Official(
            "SAN B/16",
            "san_vit_b_16.pth",
            {"trained": 8_370_866, "paper_trained": 8.4e6, "paper": 64.3e9, "code": 63.3e9},
        ),
        _OFFICIAL_PROOF,
    ),
    Preset(
        _vit_l14("san-vit-l14", quick_gelu=True, image_size=336, clip_scale=0.7),
        "timm/vit_large_patch14_clip_336.openai",
        Official("SAN L/14-336", "san_vit_large_14.pth", {"trained": 9_321_650, "code": 396.8e9}),
        "parameters and operations counted against the official code; untested with real weights here",
    ),
    Preset(_vit_b16("laion-vit-b16", quick_gelu=False), "laion/CLIP-ViT-B-16-laion2B-s34B-b88K", proved=_VIT_PROOF),
    Preset(
        _vit_b16("datacomp-vit-b16", quick_gelu=False),
        "laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K",
        proved=_VIT_PROOF,
    ),
    Preset(_vit_b16("dfn-vit-b16", quick_gelu=True), "apple/DFN2B-CLIP-ViT-B-16", proved=_VIT_PROOF),
    Preset(
        _vit_b16("metaclip-vit-b16", quick_gelu=True),
        "timm/vit_base_patch16_clip_224.metaclip_400m",
        proved=_VIT_PROOF,
    ),
    Preset(
        _vit_l14("openflamingo-vit-l14", quick_gelu=True), "timm/vit_large_patch14_clip_224.openai", proved=_VIT_PROOF
    ),
    Preset(_resnet50("openai-rn50"), "timm/resnet50_clip.openai"),
    Preset(_pooled("siglip-vit-b16", 768, "vit_base_patch16_siglip_224", 12, _SIGLIP_TEXT), "timm/ViT-B-16-SigLIP"),
    Preset(_pooled("siglip2-vit-b16", 768, "vit_base_patch16_siglip_224", 12, _SIGLIP2_TEXT), "timm/ViT-B-16-SigLIP2"),
    Preset(_pooled("pe-core-b16", 1024, "vit_pe_core_base_patch16_224", 12, _PE_TEXT), "timm/PE-Core-B-16"),
    Preset(
        _eva("eva02-clip-b16", 512, "eva02_base_patch16_clip_224", 12, _TEXT_512),
        "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k",
    ),
    Preset(
        _convnext("laion-convnext-b", 640, "convnext_base", TextConfig(width=640, layers=12, heads=10)),
        "laion/CLIP-convnext_base_w-laion2B-s13B-b82K",
    ),
    Preset(
        _convnext("laion-convnext-l", 768, "convnext_large", TextConfig(width=768, layers=16, heads=12), "mlp"),
        "laion/CLIP-convnext_large_d.laion2B-s26B-b102K-augreg",
    ),
    Preset(_align("align-base"), "kakaobrain/align-base"),
)

PRESETS = {preset.config.name: preset for preset in _PRESETS}
"""By name. `photo` and `tiny` are not here: their configurations lie beside their weights in the package."""
