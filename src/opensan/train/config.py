"""Configuration of a training run: typed fields; an unknown key is an error."""

from typing import Annotated

from pydantic import Field

from opensan.config import Config, Weight
from opensan.data.augment import AugmentConfig
from opensan.train.matcher import LossWeights
from opensan.train.parallel import Parallel
from opensan.train.precision import Precision

# Bounds that no training meets: a mistyped number must not ask for unbounded memory or time.
Positive = Annotated[int, Field(gt=0, le=1_000_000_000)]
NotNegative = Annotated[int, Field(ge=0, le=1_000_000_000)]


class LoopConfig(Config):
    """Settings of the training loop, whatever model is trained."""

    steps: Positive = 60_000
    """Updates of the weights."""
    batch_size: Positive = 32
    """Samples in a micro-batch. A step takes batch_size * accumulate * processes samples, 32 in the official recipe."""
    accumulate: Positive = 1
    """Micro-batches a step: n of them give the update of n ranks with one each."""
    learning_rate: Annotated[float, Field(gt=0, le=1_000)] = 1e-4
    """AdamW's learning rate at the first step."""
    weight_decay: Weight = 1e-4
    """Decoupled weight decay; LayerNorms of the side network, queries and position tables have none."""
    poly_power: Annotated[float, Field(ge=0, le=100)] = 0.9
    """The learning rate at step s is learning_rate * (1 - s / steps) ** poly_power."""
    warmup: NotNegative = 0
    """Steps of linear warm-up."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 0.01
    """Limit of the joint L2 norm of all gradients."""
    precision: Precision = "auto"
    """Number format of the forward pass: auto (bfloat16 on a GPU that has it, float16 with a loss scale on another,
    float32 on a CPU), float32, bfloat16 or float16. Weights, losses and optimizer stay float32."""
    parallel: Parallel = "ddp"
    """With several processes: ddp (each holds the model) or fsdp (they split it)."""
    activation_checkpointing: bool = False
    """Compute the blocks' activations again in the backward pass instead of keeping them."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the samples' order, of augmentation, of points, and of a new side adapter."""
    workers: Annotated[int, Field(ge=0, le=1_024)] = 0
    """Processes that read and augment samples; 0 does it in the training process."""
    save_every: Positive = 500
    """Steps between checkpoints."""
    keep: Positive = 2
    """Checkpoints to keep, the best one not counted."""
    log_every: Positive = 10
    """Steps between rows of the log."""
    validate_every: NotNegative = 0
    """Steps between validations; 0: none."""
    patience: NotNegative = 0
    """Validations in a row without a better score after which training ends early; 0: it never does."""


HARMLESS = {
    "accumulate",
    "parallel",
    "activation_checkpointing",
    "workers",
    "save_every",
    "keep",
    "log_every",
    "validate_every",
    "patience",
}
"""Loop settings that change results only by rounding: they may differ when a run is resumed. So may `accumulate`,
because the number of micro-batches of all processes in a step is compared instead."""


class PointsConfig(Config):
    """Number and choice of the points at which masks are compared (see opensan.train.points.RandomPoints)."""

    count: Positive = 12_544
    """Points of each mask, and of each image in matching."""
    oversampling: Annotated[float, Field(ge=1, le=1_000)] = 3.0
    """Candidates per point, from which the uncertain ones are chosen."""
    importance: Annotated[float, Field(ge=0, le=1)] = 0.75
    """Share of the points that are the most uncertain; the rest is random."""


class SelfTrainingConfig(Config):
    """Learning from images without labels: a mean teacher labels them for the model in training."""

    confidence: Annotated[float, Field(ge=0, le=1)] = 0.7
    """The teacher's labels count where its confidence is so high; other pixels are ignored."""
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    """Temperature of the confidence, as `opensan calibrate` fits it; 1: the word's share of all words' scores."""
    doubtful_temperature: Annotated[float, Field(ge=1e-3, le=1e3)] | None = None
    """Temperature where no score reaches `doubtful_below`, as of a calibration; null: the same."""
    doubtful_below: Weight = 0.0
    """A score of a word, 0 or more."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Share of the teacher's weights that stays in a step; the rest is the model's. Less in the first steps."""
    weight: Weight = 1.0
    """Weight of the losses on images without labels."""
    ramp_up: NotNegative = 0
    """Steps in which that weight rises from 0."""


class SanTrainingConfig(Config):
    """Training a SAN on labelled images. Defaults are the official recipe's."""

    loop: LoopConfig = LoopConfig()
    augment: AugmentConfig = AugmentConfig()
    points: PointsConfig = PointsConfig()
    loss_weights: LossWeights = LossWeights()
    no_object_weight: Weight = 0.1
    """Class-loss weight of queries without a segment."""
    objects: bool = False
    """Train for objects: each object of a thing is a segment of its own. The data sets must know objects."""
    spare_unlabelled: bool = False
    """A query without a segment need not say no-object where more than half of its mask lies on unlabelled pixels: for
    data in which those show something without a name, as stuff in a set that labels things only."""
    self_training: SelfTrainingConfig = SelfTrainingConfig()
