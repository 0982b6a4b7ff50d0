"""The variants of the paper's ablations: for each, what differs from the base. Needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opensan.config import ModelConfig, SideAdapterConfig, parse_config
from opensan.errors import UserError, did_you_mean
from opensan.lab.ablation.templates import IMAGENET_TEMPLATES
from opensan.vocabulary import Templates

LAST = -1
"""The side network's last block, in `supervised_blocks`."""

BASE = "base"
"""Name of the variant that all others are compared with: SAN as the paper has it."""


@dataclass(frozen=True)
class Variant:
    """A SAN that differs from the base in one respect."""

    name: str
    claim: str
    """Claim of the paper in favour of the base."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `ModelConfig` or of its side adapter -> values. A string "x0.5" is the base's number times that."""
    templates: Templates = "vild"
    """Prompt templates, in training and in the test."""
    method: str = ""
    """The baseline that labels with the trained weights; "" for the SAN itself."""
    trained: bool = True
    """Whether it is trained at all."""

    def config(self, base: ModelConfig) -> ModelConfig:
        """Return the variant of a configuration. Raises UserError, one line, if it cannot be built."""
        plain = base.model_dump()
        for key, value in self.changes.items():
            section = plain["side_adapter"] if key in SideAdapterConfig.model_fields else plain
            if isinstance(value, str) and value.startswith("x"):
                value = type(section[key])(section[key] * float(value[1:]))
            section[key] = value
        plain["side_adapter"] = _fitting(plain["side_adapter"], self.changes)
        return parse_config(ModelConfig, plain, f"variant {self.name}")


def _fitting(side: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Let what depends on depth and width follow them, where the variant does not say it."""
    if "depth" in changes and "supervised_blocks" not in changes:
        side = {**side, "supervised_blocks": (side["depth"] - 1, side["depth"])}
    side = {**side, "supervised_blocks": [side["depth"] if b == LAST else b for b in side["supervised_blocks"]]}
    if "width" in changes:
        side = {**side, "width": side["width"] // side["heads"] * side["heads"]}
    return {**side, "fusion": {block: layer for block, layer in side["fusion"].items() if block < side["depth"]}}


EARLY = "CLIP's features help the side network, early and from several layers"
ADDING = "adding CLIP's features is enough"
DECOUPLED = "mask prediction and recognition need heads of their own"
STEERING = "a learned attention bias is the best way to steer CLIP"
END_TO_END = "training end to end makes the proposals fit CLIP"
SINGLE = "one forward pass of CLIP serves features and recognition"
FROZEN = "a frozen CLIP keeps its open vocabulary"
SIZE = "a small side network is enough"

OWN_CLASSES = {"recognition": "queries", "trained_clip": "none"}

VARIANTS = (
    Variant(BASE, ""),
    Variant("no fusion", EARLY, {"fusion": {}}),
    Variant("shared head", DECOUPLED, {"head": "shared"}),
    Variant("mask pooling", STEERING, {"recognition": "pooling"}),
    Variant("gradient cut", END_TO_END, {"cut_gradient": True}),
    Variant("CLIP whole", FROZEN, {"trained_clip": "whole"}),
    Variant("two-stage", END_TO_END, {**OWN_CLASSES, "fusion": {}}, method="two-stage"),
    Variant("blocked attention", STEERING, {"recognition": "blocked"}),
    Variant("own forward", SINGLE, {"recognition_scale": 1.0}),
    Variant("CLIP all frozen", FROZEN, {"trained_clip": "none"}),
    Variant("fusion at the input", EARLY, {"fusion": {0: 0}}),
    Variant("gated fusion", ADDING, {"fusion_kind": "gated"}),
    Variant("cross-attention", ADDING, {"fusion_kind": "cross-attention"}),
    Variant("no deep supervision", "deep supervision helps", {"supervised_blocks": (LAST,)}),
    Variant("one bias for all heads", "each of CLIP's heads needs its bias", {"bias_per_head": False}),
    Variant("a bias for each layer", "one bias serves all recognition layers", {"bias_per_layer": True}),
    Variant("single template", "14 templates are better than one", templates="single"),
    Variant("80 templates", "14 templates are as good as CLIP's 80", templates=IMAGENET_TEMPLATES),
    Variant("shared head, cut", END_TO_END, {"head": "shared", "cut_gradient": True}),
    Variant("mask tokens", STEERING, OWN_CLASSES, method="mask-tokens"),
    Variant("fusion of layer 1", EARLY, {"fusion": {1: 1}}),
    Variant("fusion of layer 2", EARLY, {"fusion": {2: 2}}),
    Variant("fusion of layer 3", EARLY, {"fusion": {3: 3}}),
    Variant("quarter of the queries", SIZE, {"queries": "x0.25"}),
    Variant("half the queries", SIZE, {"queries": "x0.5"}),
    Variant("twice the queries", SIZE, {"queries": "x2"}),
    Variant("half the depth", SIZE, {"depth": "x0.5"}),
    Variant("half the width", SIZE, {"width": "x0.5"}),
    Variant("twice the width", SIZE, {"width": "x2"}),
    Variant("fewer recognition layers", "three recognition layers are enough", {"recognition_layer": 4}),
    Variant("CLIP at full scale", "CLIP sees a smaller image than the side network", {"clip_scale": "x2"}),
    Variant("dense CLIP", "CLIP alone finds no regions", method="maskclip,plain", trained=False),
)
"""All variants in the order in which they are run: the paper's main claims first."""


def chosen(only: Sequence[str]) -> list[Variant]:
    """Return the variants of these names, with the base, in the order of `VARIANTS`; all, if none is named.

    Raises UserError, one line, for an unknown name.
    """
    names = [variant.name for variant in VARIANTS]
    for name in only:
        if name not in names:
            hint = did_you_mean(name, names) or f": {', '.join(names)}"
            raise UserError(f"--only: no variant {name!r}{hint}")
    return [variant for variant in VARIANTS if not only or variant.name in (BASE, *only)]
