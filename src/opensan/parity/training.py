"""Compare losses, matches, gradients, the optimizer's table and the first steps with the official code's figures.

The official run used a fixed grid in place of random points, so its figures can be compared directly.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from opensan.checkpoints import build_empty
from opensan.checkpoints.official import official_name, official_shape
from opensan.checkpoints.presets import PRESETS
from opensan.config import ClipConfig, ModelConfig, SideAdapterConfig, TextConfig, VisionConfig
from opensan.errors import UserError
from opensan.model import SAN
from opensan.parity.golden import golden_model, read_arrays
from opensan.parity.report import Difference
from opensan.structures import TextClassifier
from opensan.text.encoder import pad_tokens, tokenize
from opensan.train.config import LoopConfig
from opensan.train.criterion import SetCriterion, mask_normalizer
from opensan.train.log import NoProgress
from opensan.train.loop import Trainer
from opensan.train.matcher import LayerOutput, Matches
from opensan.train.optimizer import san_parameter_groups
from opensan.train.points import FixedPoints
from opensan.train.targets import MaskTargets
from opensan.vocabulary import Vocabulary

GOLDEN_CONFIG = ModelConfig(
    name="tiny-config",
    clip=ClipConfig(
        embed_dim=64,
        quick_gelu=True,
        vision=VisionConfig(width=64, layers=6, heads=4, patch_size=16, image_size=64),
        text=TextConfig(width=64, layers=3, heads=4),
    ),
    side_adapter=SideAdapterConfig(width=144, image_size=128, queries=20, fusion={0: 0, 1: 1, 2: 2, 3: 4}),
    recognition_layer=4,
)
"""The training golden names no model; it was made with that of the first tiny inference golden."""

PARAMETER_TABLES = {"parameters_tiny.json": GOLDEN_CONFIG, "parameters_b16.json": PRESETS["san-vit-b16"].config}
"""Files that may lie beside a training golden: which parameters are trained, and how."""

RELATIVE_LIMIT = 1e-6
NORM_LIMIT = 1e-8
"""Limit for the parameters' norms after 20 steps: a wrong weight decay shows nowhere else."""
FLOAT32_LIMITS = {"mask_logits": 1e-4, "attention_bias": 3e-4, "mask_embeddings": 1e-5, "class_logits": 4e-4}
GRID_SIDE = 64
SCHEDULE_STEPS = 100
CLIP_NORM = 0.01


@dataclass(frozen=True)
class Golden:
    """Inputs and recorded results of the official run."""

    arrays: Mapping[str, np.ndarray]
    figures: Mapping


@dataclass(frozen=True)
class Step:
    """Results of one forward and backward pass."""

    losses: dict[str, Tensor]
    matches: list[Matches]
    outputs: dict[str, Tensor]


def check_training(arrays: Path, figures: Path, *, trajectory: bool = True) -> list[Difference]:
    """Compare a training run with the official one, in float64 unless a row says otherwise.

    The tables of parameters that lie beside the golden are compared too.

    Args:
        arrays: a golden train_*.npz.
        figures: its .json.
        trajectory: also take the 20 optimizer steps.

    Raises:
        ValueError: a file that is not such a golden.
    """
    golden = _read(arrays, figures)
    model = golden_model(GOLDEN_CONFIG).double().train()
    text = _text_classifier(model, golden)
    official = {name: official_name(name, model.config) for name, _ in model.named_parameters()}
    pixels, targets = _pixels(model, golden), _targets(model, golden)
    expected = golden.figures["float64"]
    step = _forward(model, pixels, targets, text)
    total = torch.stack(list(step.losses.values())).sum()
    total.backward()

    rows = _check_outputs(step.outputs, golden)
    rows += [_relative(f"{name}, relative", value, expected["loss_grid"][name]) for name, value in step.losses.items()]
    rows += [_relative("total loss, relative", total, expected["total"])]
    rows += _check_matches(step.matches, expected["matched"])
    rows += _check_gradients(model, official, golden)
    if trajectory:
        model.zero_grad(set_to_none=True)
        rows += _check_trajectory(model, official, pixels, targets, text, expected)
    for name, config in PARAMETER_TABLES.items():
        if (path := arrays.parent / name).exists():
            rows += check_parameter_table(build_empty(config), json.loads(path.read_text(encoding="utf-8")), name)
    return rows


def _read(arrays: Path, figures: Path) -> Golden:
    loaded = read_arrays(arrays)
    try:
        parsed = json.loads(figures.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{figures}: not a training golden's figures ({error})") from None
    if "float64" not in parsed or "image_a" not in loaded:
        raise UserError(f"{arrays}: not a training golden")
    return Golden(loaded, parsed)


@torch.no_grad()
def _text_classifier(model: SAN, golden: Golden) -> TextClassifier:
    """Return the golden's words in float64: the text encoder's float32 rows are too coarse to compare 20 steps."""
    vocabulary = Vocabulary.parse(golden.figures["words"], templates=golden.figures["templates"])
    rows = [model.embed_prompts(pad_tokens([tokenize(p) for p in row])).mean(0) for row in vocabulary.prompts()]
    unit = functional.normalize(torch.stack(rows), dim=1)
    return TextClassifier(unit, torch.tensor(vocabulary.row_class), len(vocabulary.words))


def check_parameter_table(model: SAN, table: Mapping, source: str) -> list[Difference]:
    """Compare which parameters exist and are trained, and with which rate and decay, with parameters_*.json.

    `model` may live on the meta device. Each row counts parameters that differ; the limit is none.
    """
    settings = {
        name: (group.learning_rate, group.weight_decay) for group in san_parameter_groups(model) for name in group.names
    }
    ours = {
        official_name(name, model.config): (
            official_shape(name, parameter.shape),
            parameter.requires_grad,
            *settings.get(name, (None, None)),
        )
        for name, parameter in model.named_parameters()
    }
    theirs = {name: (tuple(shape), *rest) for name, shape, *rest in table["parameters"]}
    both = ours.keys() & theirs.keys()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rows = [Difference(f"{source}: parameters of one side only", float(len(ours.keys() ^ theirs.keys())), 0.0)]
    for position, property_name in enumerate(("shape", "trained", "learning rate", "weight decay")):
        differing = [name for name in both if ours[name][position] != theirs[name][position]]
        rows.append(Difference(f"{source}: parameters of another {property_name}", float(len(differing)), 0.0))
    rows.append(Difference(f"{source}: trained numbers", float(abs(trained - table["trained"])), 0.0))
    return rows


def _pixels(model: SAN, golden: Golden) -> Tensor:
    """Return the golden's two images as one float64 batch, zero-padded after normalisation."""
    # The constants are rounded to float32 before float64, as in the official float64 run.
    mean = torch.tensor(model.config.image.mean).double()
    std = torch.tensor(model.config.image.std).double()
    images = [(torch.from_numpy(golden.arrays[f"image_{letter}"]).double() - mean) / std for letter in "ab"]
    height, width = _padded_size(model, golden)
    return torch.stack(
        [functional.pad(i.permute(2, 0, 1), (0, width - i.shape[1], 0, height - i.shape[0])) for i in images]
    )


def _padded_size(model: SAN, golden: Golden) -> tuple[int, int]:
    divisor = model.config.image.size_divisor
    shapes = [golden.arrays[f"image_{letter}"].shape for letter in "ab"]
    height, width = (-(-max(shape[side] for shape in shapes) // divisor) * divisor for side in (0, 1))
    return height, width


def _targets(model: SAN, golden: Golden) -> MaskTargets:
    height, width = _padded_size(model, golden)
    masks = [torch.from_numpy(golden.arrays[f"target_masks_{letter}"]) for letter in "ab"]
    padded = [functional.pad(m, (0, width - m.shape[2], 0, height - m.shape[1])) for m in masks]
    labels = [torch.from_numpy(golden.arrays[f"target_labels_{letter}"]) for letter in "ab"]
    return MaskTargets.from_masks(padded, labels)


def _forward(model: SAN, pixels: Tensor, targets: MaskTargets, text: TextClassifier) -> Step:
    proposals = model.propose(pixels, supervise=True)
    layers = [proposals, *proposals.auxiliary]
    class_logits = [model.classify(layer, text) for layer in layers]
    criterion = SetCriterion(FixedPoints.grid(GRID_SIDE))
    outputs = [LayerOutput(layer.mask_logits, logits) for layer, logits in zip(layers, class_logits, strict=True)]
    losses, matches = criterion(outputs, targets, mask_normalizer([targets], pixels.device))
    *auxiliary, last = model.config.side_adapter.supervised_blocks
    named: dict[str, Tensor] = {}
    for block, layer, logits in zip((last, *auxiliary), layers, class_logits, strict=True):
        named[f"mask_logits/block{block}"] = layer.mask_logits
        assert layer.attention_bias is not None
        named[f"attention_bias/block{block}"] = layer.attention_bias
        named[f"mask_embeddings/block{block}"] = layer.mask_embeddings
        named[f"class_logits/block{block}"] = logits
    return Step(losses, matches, named)


def _relative(name: str, ours: Tensor | float, theirs: float, limit: float = RELATIVE_LIMIT) -> Difference:
    value = ours.item() if isinstance(ours, Tensor) else ours
    return Difference(name, abs(value - theirs) / abs(theirs), limit)


def _check_outputs(outputs: Mapping[str, Tensor], golden: Golden) -> list[Difference]:
    """Compare the supervised blocks' outputs with the golden's, which are of the float32 run."""
    rows = []
    for name, ours in outputs.items():
        theirs = golden.arrays[f"expect/{name}"]
        difference = np.abs(ours.detach().numpy() - theirs).max()
        rows.append(Difference(f"{name}, to the float32 run", float(difference), FLOAT32_LIMITS[name.split("/")[0]]))
    return rows


def _check_matches(matches: Sequence[Matches], expected: Mapping[str, list]) -> list[Difference]:
    rows = []
    for name, pairs in zip(("final", *(f"aux_{i}" for i in range(len(matches) - 1))), matches, strict=True):
        ours = list(zip(pairs.image.tolist(), pairs.query.tolist(), pairs.segment.tolist(), strict=True))
        theirs = [
            (image, query, segment)
            for image, (queries, segments) in enumerate(expected[name])
            for query, segment in zip(queries, segments, strict=True)
        ]
        rows.append(Difference(f"matched pairs that differ, {name}", float(len(set(ours) ^ set(theirs))), 0.0))
    return rows


def _check_gradients(model: SAN, official: Mapping[str, str], golden: Golden) -> list[Difference]:
    """Compare the norms of all gradients with the float64 run, and full gradients with the float32 run."""
    figures = golden.figures["float64"]
    gradients = {official[name]: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = {name: float(gradient.norm()) for name, gradient in gradients.items()}
    expected = figures["grad_norms"]
    # A gradient that is zero in theory (a key's bias) has a norm of rounding errors: divide by the largest norm.
    floor = 1e-9 * max(expected.values())
    worst = max(
        abs(norms[name] - expected[name]) / max(expected[name], floor) for name in norms.keys() & expected.keys()
    )
    rows = [
        Difference("gradients of one side only", float(len(norms.keys() ^ expected.keys())), 0.0),
        Difference(f"{len(expected)} gradient norms, largest relative", worst, RELATIVE_LIMIT),
        _relative("joint gradient norm, relative", _joint_norm(gradients.values()), figures["grad_norm_global"]),
    ]
    for key, theirs in golden.arrays.items():
        if key.startswith("expect_gradient/"):
            name = key.removeprefix("expect_gradient/")
            ours = gradients[name].reshape(theirs.shape).numpy()
            difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
            rows.append(Difference(f"gradient of {name}, to the float32 run, relative", difference, 1e-3))
    return rows


def _joint_norm(tensors) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


class _GoldenSource:
    """The golden's batch at every step (a `TrainingSource`)."""

    def __init__(self, pixels: Tensor, targets: MaskTargets) -> None:
        self.batch = _GoldenBatch(pixels, targets)

    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        return "the golden's images"

    def load(self, index: int, generator: np.random.Generator) -> "_GoldenBatch":
        return self.batch

    def collate(self, samples: list["_GoldenBatch"]) -> "_GoldenBatch":
        return samples[0]


@dataclass(frozen=True)
class _GoldenBatch:
    pixels: Tensor
    targets: MaskTargets

    def to(self, device: torch.device) -> "_GoldenBatch":
        return self


class _GoldenTask(nn.Module):
    """The golden's forward pass in float64 with fixed points."""

    def __init__(self, model: SAN, text: TextClassifier) -> None:
        super().__init__()
        self.model, self.text = model, text

    def prepare(self, batches: Sequence[_GoldenBatch]) -> None: ...

    def forward(self, batch: _GoldenBatch, _prepared: None) -> dict[str, Tensor]:
        return _forward(self.model, batch.pixels, batch.targets, self.text).losses


class _Enough(Exception):
    """Raised to end the run after the golden's steps: its learning-rate schedule is longer."""


class _Figures:
    """Logger that keeps a run's figures (a `RunLogger`)."""

    def __init__(self) -> None:
        self.steps: list[Mapping[str, float]] = []

    def start(self, step: int) -> None: ...

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.steps.append(figures)

    def pictures(self, step: int, pictures: Mapping) -> None: ...

    def close(self) -> None: ...


def _check_trajectory(
    model: SAN,
    official: Mapping[str, str],
    pixels: Tensor,
    targets: MaskTargets,
    text: TextClassifier,
    figures: Mapping,
) -> list[Difference]:
    """Compare the trainer's steps on the fixed batch: losses and norms of every step, and the final parameters."""
    trajectory = figures["trajectory"]
    steps = _train(model, text, _GoldenSource(pixels, targets), len(trajectory))
    worst = dict.fromkeys(("learning rate", "gradient norm", "losses"), 0.0)
    for ours, expected in zip(steps, trajectory, strict=True):
        losses = [_relative(name, ours[name], expected[name]).value for name in ours if name.startswith("loss_")]
        for figure, value in (
            ("learning rate", _relative("", ours["learning_rate"], expected["lr"]).value),
            ("gradient norm", _relative("", ours["gradient_norm"], expected["grad_norm_before_clip"]).value),
            ("losses", max(losses)),
        ):
            worst[figure] = max(worst[figure], value)
    count = len(trajectory)
    rows = [Difference(f"{count} steps: {figure}, relative", value, RELATIVE_LIMIT) for figure, value in worst.items()]
    norms = {official[name]: float(p.detach().norm()) for name, p in model.named_parameters() if p.requires_grad}
    expected = figures["final_param_norms"]
    difference = max(abs(norms[name] - expected[name]) / expected[name] for name in expected)
    return [*rows, Difference(f"parameter norms after {count} steps, relative", difference, NORM_LIMIT)]


def _train(model: SAN, text: TextClassifier, source: _GoldenSource, count: int) -> list[Mapping[str, float]]:
    """Train `model` for `count` steps of the golden's schedule and return the figures of each step."""

    def stop(_step: int) -> dict[str, float]:
        raise _Enough

    figures = _Figures()
    config = LoopConfig(
        steps=SCHEDULE_STEPS, batch_size=1, clip_norm=CLIP_NORM, log_every=1, validate_every=count, precision="float32"
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.random.fork_rng(),
        suppress(_Enough),
    ):
        groups = san_parameter_groups(model)
        task = _GoldenTask(model, text)
        Trainer(task, source, groups, config, folder, validate=stop, loggers=[figures], progress=NoProgress()).run()
        raise KeyboardInterrupt  # `run` returns here only after a signal; the validation step raises _Enough otherwise
    return figures.steps
