"""Compare our model's tensors with those of the official code, recorded in goldens."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opensan.assemble.labels import label_map
from opensan.assemble.scores import class_probabilities, score_maps
from opensan.errors import UserError
from opensan.images import prepare
from opensan.model import SAN
from opensan.parity.golden import golden_config, golden_model, read_golden
from opensan.parity.report import Difference
from opensan.parity.training import check_training
from opensan.text.encoder import TextEncoder
from opensan.vocabulary import Vocabulary

LIMITS = {
    "clip_features": 1e-5,
    "clip_class_token": 1e-5,
    "mask_logits": 1e-4,
    "attention_bias": 3e-4,
    "mask_embeddings": 1e-5,
    "text_classifier": 1e-6,
    "class_logits": 4e-4,
    "scores": 1e-4,
    "margin": 3e-3,
    "labels": 0.0,
}
"""Largest absolute differences: any correct float32 computation stays within them, a wrong epsilon does not."""

CLEAR_MARGIN = 1e-4
"""Labels must agree where the best score leads by more than this; below it, rounding decides."""


def check_inference(path: Path, device: str = "cpu") -> list[Difference]:
    """Compare every tensor recorded in the golden at `path` with ours, computed on `device`.

    Raises ValueError on an unreadable file.
    """
    meta, arrays = read_golden(path)
    model = golden_model(golden_config(meta, str(path))).to(device)
    expected = {name.removeprefix("expect/"): array for name, array in arrays.items() if name.startswith("expect/")}
    ours, labels, margin = _answers(model, meta, arrays)
    unknown = expected.keys() - ours.keys()
    if unknown:
        raise UserError(f"{path}: records tensors that this version does not know: {', '.join(sorted(unknown))}")
    rows = []
    for name, theirs in expected.items():
        steps = tuple(slice(None, None, step) for step in meta["steps"][name])
        ours_sampled = ours[name].cpu().numpy()[steps]
        if ours_sampled.shape != theirs.shape:
            raise UserError(f"{path}: {name} has shape {ours_sampled.shape} here and {theirs.shape} there")
        difference = np.abs(ours_sampled.astype(np.float64) - theirs.astype(np.float64)).max()
        rows.append(Difference(name, float(difference), LIMITS[name.split("/")[0]]))
    wrong = (labels.cpu().numpy() != arrays["labels"]) & (margin.cpu().numpy() > CLEAR_MARGIN)
    rows.append(Difference("labels (clear pixels that differ)", float(wrong.sum()), LIMITS["labels"]))
    return rows


@torch.inference_mode()
def _answers(
    model: SAN, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return our tensors by the golden's names, the label map, and the margin of the best score."""
    image = arrays["image"]
    prepared = prepare(image, model.config.image, resize=False)
    sizes = replace(prepared.sizes, image=tuple(arrays["output_size"].tolist()))
    pixels = torch.as_tensor(prepared.pixels).unsqueeze(0).to(model.no_object_embedding.device)

    features = model.shallow_features(pixels)
    proposals = model.propose(pixels)
    assert proposals.attention_bias is not None
    vocabulary = Vocabulary.parse(list(meta["words"]), templates=meta["templates"])
    text = TextEncoder(model, disk_cache=False).classifier(vocabulary)
    logits = model.classify(proposals, text)[0]
    masks, probabilities = proposals.mask_logits[0], class_probabilities(logits)
    scores = score_maps(masks, probabilities, sizes)
    best = scores.topk(2, dim=0).values
    ours = {
        "mask_logits": masks,
        "attention_bias": proposals.attention_bias[0],
        "mask_embeddings": proposals.mask_embeddings[0],
        "text_classifier": torch.cat([text.rows, model.no_object_row()]),
        "class_logits": logits,
        "scores": scores,
        "margin": best[0] - best[1],
        f"clip_class_token/{model.config.recognition_layer}": features.tokens[0, 0],
    }
    for layer, (tokens, _) in features.maps.items():
        ours[f"clip_features/{layer}"] = tokens[0].T.unflatten(1, features.grid)
    return ours, label_map(masks, probabilities, sizes), best[0] - best[1]


def is_training(path: Path) -> bool:
    """Return whether a golden records a training step (its figures lie in a .json of the same name)."""
    return path.with_suffix(".json").exists()


def check_golden(path: Path) -> list[Difference]:
    """Compare everything that a golden records, of inference or training, with ours."""
    return check_training(path, path.with_suffix(".json")) if is_training(path) else check_inference(path)
