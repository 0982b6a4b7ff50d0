"""Build a baseline from its source, and list the stages of its work."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from opensan.images import MAX_PIXELS
from opensan.model import SAN
from opensan.segmenters.base import Segmenter
from opensan.segmenters.baselines import Baseline, dense, mask_tokens, two_stage
from opensan.segmenters.baselines.counting import Stage
from opensan.segmenters.san import weights_of
from opensan.structures import TextClassifier

_SEGMENTERS: dict[str, Callable[..., Segmenter]] = {
    "maskclip": dense.DenseSegmenter,
    "two-stage": two_stage.TwoStageSegmenter,
    "mask-tokens": mask_tokens.MaskTokenSegmenter,
}
_STAGES: dict[str, Callable[[SAN, Any, Tensor, TextClassifier], list[Stage]]] = {
    "maskclip": dense.stages,
    "two-stage": two_stage.stages,
    "mask-tokens": mask_tokens.stages,
}


def load_baseline(
    baseline: Baseline,
    *,
    device: str | torch.device = "auto",
    random_weights: int | None = None,
    max_pixels: int = MAX_PIXELS,
    text_cache: bool = True,
) -> Segmenter:
    """Load the weights of a baseline's model and build its segmenter; arguments and errors as for `load_san`."""
    model = weights_of(baseline.model, random_weights)
    return build_baseline(baseline, model, device=device, max_pixels=max_pixels, text_cache=text_cache)


def build_baseline(baseline: Baseline, model: SAN, **settings: Any) -> Segmenter:
    """Build the segmenter of a baseline on a model. Raises UserError if the model lacks what the method needs."""
    return _SEGMENTERS[baseline.method](model, baseline.options, **settings)


def baseline_stages(baseline: Baseline, model: SAN, size: tuple[int, int], words: int) -> list[Stage]:
    """Return the stages of a method's work on one image of `size` (H, W), on the model's own device.

    On torch's meta device they can be counted without memory.
    """
    if baseline.method == "maskclip":
        dense.check_dense(model, cast(Any, baseline.options))
    if baseline.method == "mask-tokens":
        mask_tokens.check_plain_vit(model)
    where = model.no_object_embedding.device
    rows = torch.empty(words, model.config.clip.embed_dim, device=where)
    text = TextClassifier(rows, torch.arange(words, device=where), words)
    with torch.no_grad():
        return _STAGES[baseline.method](model, baseline.options, torch.empty(1, 3, *size, device=where), text)
