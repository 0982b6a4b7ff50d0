"""Training against the official code's recorded figures (tests/goldens)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from opensan.checkpoints import build_empty
from opensan.checkpoints.presets import PRESETS
from opensan.parity.training import PARAMETER_TABLES, check_parameter_table, check_training
from opensan.train.criterion import SetCriterion, mask_normalizer
from opensan.train.matcher import LayerOutput
from opensan.train.points import RandomPoints
from opensan.train.targets import LabelMapTargets

GOLDENS = Path(__file__).parent / "goldens"
SHARED = Path(__file__).parents[2] / "shared" / "goldens"


def test_losses_matches_gradients_and_twenty_steps():
    rows = check_training(GOLDENS / "train_tiny.npz", GOLDENS / "train_tiny.json")
    assert len(rows) >= 35
    assert [row for row in rows if not row.passed] == []
    # The constants are the official ones to the last bit, so the losses agree far below the limit.
    assert max(row.value for row in rows if row.name.startswith("loss_")) < 1e-12


@pytest.mark.parametrize("file", PARAMETER_TABLES)
def test_trained_parameters_learning_rates_and_weight_decays(file):
    path = next((folder / file for folder in (GOLDENS, SHARED) if (folder / file).exists()), None)
    if path is None:
        pytest.skip(f"needs {SHARED / file}")
    rows = check_parameter_table(build_empty(PARAMETER_TABLES[file]), json.loads(path.read_text()), file)
    assert [row for row in rows if not row.passed] == []


def test_trained_parameters_of_the_large_preset():
    model = build_empty(PRESETS["san-vit-l14"].config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 9_321_650


def test_random_points_give_the_official_mean_losses():
    arrays = np.load(GOLDENS / "train_tiny.npz")
    figures = json.loads((GOLDENS / "train_tiny.json").read_text())["random_points"]["losses"]
    outputs = [
        LayerOutput(
            *(torch.from_numpy(arrays[f"expect/{kind}/block{block}"]) for kind in ("mask_logits", "class_logits"))
        )
        for block in (8, 7)
    ]
    maps = []
    for image in "ab":
        masks, labels = arrays[f"target_masks_{image}"], arrays[f"target_labels_{image}"]
        full = np.full((160, 128), -1, dtype=np.int16)
        for mask, label in zip(masks, labels, strict=True):
            full[: mask.shape[0], : mask.shape[1]][mask > 0] = label
        maps.append(full)
    targets = LabelMapTargets.from_maps(maps)
    criterion = SetCriterion(RandomPoints())
    seeds = 12
    runs = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        losses, _ = criterion(outputs, targets, mask_normalizer([targets], "cpu"))
        runs.append([value.item() for value in losses.values()])
    for name, mean in zip(losses, np.mean(runs, axis=0), strict=True):
        # Four standard errors of both means (theirs has 64 seeds).
        allowed = 4 * figures[name]["std"] * (1 / seeds + 1 / 64) ** 0.5 + 1e-5
        assert mean == pytest.approx(figures[name]["mean"], abs=allowed), name


def test_the_no_object_weight_is_a_float32_number():
    """The no-object weight is the float32 number nearest to 0.1: in float64 the difference is visible."""
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    output = LayerOutput(torch.zeros(2, 3, 4, 4, dtype=torch.float64), logits)
    targets = LabelMapTargets.from_maps([np.zeros((8, 8), np.int16)] * 2)
    ours, matches = SetCriterion(RandomPoints(16))([output], targets, 2.0)
    wanted = torch.full((2, 3), 4)
    wanted[matches[0].image, matches[0].query] = 0
    weight = torch.ones(5).double()
    weight[4] = float(np.float32(0.1))
    exact = 2 * functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight)
    assert abs(ours["loss_ce"].item() / exact.item() - 1) < 1e-14
