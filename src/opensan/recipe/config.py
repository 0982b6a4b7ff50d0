"""Read the configuration file of `opensan train`: plain YAML, checked, and never executed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from opensan.config import Config, parse_config
from opensan.errors import UserError, reason, short
from opensan.recipe.plain_yaml import read_yaml
from opensan.train.config import LoopConfig, NotNegative, Positive, SanTrainingConfig
from opensan.train.trackers import TrackerName

_DEEPEST = 16
"""Parts of a key; the deepest one of the configuration has four."""


class StartConfig(Config):
    """The model and weights that training starts from."""

    model: str = "san-vit-b16"
    """san-vit-b16, san-vit-l14, photo, tiny, a folder; with `weights: model` also an official .pth or a hub id."""
    weights: Literal["clip", "model", "random"] = "clip"
    """clip: CLIP's weights and a new side adapter (the recipe); model: all of the model's; random: for tests."""
    clip: str = "openai"
    """CLIP's weights: openai (downloaded once), a hub id, or an open_clip file or folder."""
    keep: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of these weights in the saved model, the rest being that of the trained ones; for `weights: model`."""


class DataConfig(Config):
    """One split of a prepared data set."""

    folder: Path
    """images/, labels/, classes.txt and lists of images; or shards, also in a bucket: s3://bucket/coco."""
    split: str = "train"
    """The name of a list, without .txt."""
    ignored: tuple[str, ...] = ()
    """Classes to ignore: their pixels count as unlabelled."""


class TrainingDataConfig(DataConfig):
    """A training set."""

    weight: Annotated[float, Field(gt=0, le=1_000_000)] = 1.0
    """Its share of the batches is its weight over the sum of all weights."""


class UnlabelledConfig(Config):
    """Images without labels, which a teacher labels during the training: see `self_training`."""

    folder: Path
    """The images in it and below it."""
    words: tuple[str, ...] | Path | None = None
    """Words that the teacher labels them with: a list ("car|taxi" joins synonyms), or a word file; null: the classes of
    the training sets, if they are the same in all."""
    weight: Annotated[float, Field(gt=0, le=1_000_000)] = 1.0
    """Its share of the batches, as of a training set."""


class ValidationConfig(DataConfig):
    """Validation every `loop.validate_every` steps and after the last; mIoU marks the best checkpoint."""

    split: str = "val"
    """The name of a list, without .txt."""
    limit: Positive | None = None
    """Images to measure, spread evenly over the split; null: all."""
    pictures: NotNegative = 6
    """Images in the picture panel, spread evenly over the split."""


class _Sources(Config):
    """The fields that stand first in the file."""

    start: StartConfig = StartConfig()
    data: tuple[TrainingDataConfig, ...]
    """Training sets; a batch is drawn from one of them."""
    unlabelled: tuple[UnlabelledConfig, ...] = ()
    """Folders of images without labels; a batch may be drawn from one of these too."""
    validation: ValidationConfig | None = None


class RecipeConfig(SanTrainingConfig, _Sources):
    """All settings of `opensan train`. Defaults are the official recipe's."""

    loggers: tuple[TrackerName, ...] = ()
    """Besides log.csv: tensorboard, wandb, trackio, mlflow; each needs its package."""
    project: str = "opensan"
    """The project's name in wandb, trackio and mlflow."""
    device: str = "auto"
    """auto (cuda if there is one, else cpu), cpu, cuda, cuda:1."""
    out: Path
    """The run's folder; one that holds this run already is continued."""

    def training(self) -> SanTrainingConfig:
        """Return the settings that the run's numbers depend on, besides the model and the data."""
        return SanTrainingConfig(**{name: getattr(self, name) for name in SanTrainingConfig.model_fields})

    @model_validator(mode="after")
    def _validation_has_its_steps(self) -> "RecipeConfig":
        if self.start.keep and self.start.weights != "model":
            raise UserError(
                f"start.keep: {self.start.keep:g}: a share of a model's weights is kept with `weights: model` alone"
            )
        if self.start.keep and self.loop.parallel == "fsdp":
            raise UserError("start.keep: needs the whole weights in each process: leave loop.parallel at ddp")
        if not self.data:
            raise UserError("data: names no training set")
        if (self.validation is None) != (self.loop.validate_every == 0):
            raise UserError("`validation` names the data and `loop.validate_every` the interval: give both or neither")
        if self.loop.patience and self.validation is None:
            raise UserError("loop.patience counts validations, and there are none: give `validation`, or patience: 0")
        if self.objects and self.unlabelled:
            raise UserError("objects: the teacher of images without labels knows words alone: leave out `unlabelled`")
        return self


def _coco_stuff(model: str) -> RecipeConfig:
    return RecipeConfig(
        start=StartConfig(model=model),
        data=(TrainingDataConfig(folder=Path("prepared/coco_stuff_171")),),
        validation=ValidationConfig(folder=Path("prepared/coco_stuff_171")),
        loop=LoopConfig(validate_every=5_000, workers=8),
        out=Path("runs") / model,
    )


def read_recipe(source: str, overrides: Sequence[str] = ()) -> RecipeConfig:
    """Read the configuration of a YAML file or preset, with "key=value" overrides.

    Raises ValueError, one line, naming the file or override and the key.
    """
    if source in RECIPES:
        return override(RECIPES[source], overrides)
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the name
        known = "" if path.exists() else f"; presets are {', '.join(RECIPES)}"
        raise UserError(f"{_named(source)}: not a readable configuration ({reason(error)}){known}") from None
    data = read_yaml(text, source)
    if not isinstance(data, dict):
        raise UserError(f"{source}: not a configuration: `key: value` lines are expected")
    # Overrides come first: they may supply a key that the file lacks.
    for text in overrides:
        _apply(data, text)
    return parse_config(RecipeConfig, data, source)


def override(recipe: RecipeConfig, overrides: Sequence[str]) -> RecipeConfig:
    """Return `recipe` with "dotted.key=value" overrides; values are YAML. Raises UserError, one line."""
    data = recipe.model_dump(mode="json", exclude_unset=True)  # what nobody gave may depend on the number of images
    for text in overrides:
        _apply(data, text)
    return parse_config(RecipeConfig, data, _named(" ".join(overrides)))


def _named(text: str) -> str:
    """Return a file or an override in the form for messages."""
    return short(text, 80)[1:-1]


def _apply(data: dict[str, Any], text: str) -> None:
    """Set one "a.b.0.c=value" in a tree of plain data, creating the nodes that are missing."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"{_named(text)}: an override has the form key=value, like loop.steps=1000")
    if len(parts) > _DEEPEST:
        raise UserError(f"{_named(text)}: there is no key of {len(parts):,} parts")
    _put(data, parts, read_yaml(value, _named(text)), _named(text))


def _put(tree: Any, parts: list[str], value: Any, text: str) -> None:
    name, rest = parts[0], parts[1:]
    if isinstance(tree, list):
        if not (name.isascii() and name.isdecimal() and len(name) < 10) or int(name) > len(tree):
            raise UserError(f"{text}: a list of {len(tree)} has no element {name!r} (the first is 0)")
        key: Any = int(name)
        if key == len(tree):
            tree.append(None)
    elif isinstance(tree, dict):
        key = name
    else:
        raise UserError(f"{text}: {name!r} is no part of {short(tree)}")
    if not rest:
        tree[key] = value
        return
    if (tree.get(key) if isinstance(tree, dict) else tree[key]) is None:
        tree[key] = [] if rest[0].isdecimal() else {}
    _put(tree[key], rest, value, text)


RECIPES = {name: _coco_stuff(name) for name in ("san-vit-b16", "san-vit-l14")}
"""The official recipes, on COCO-Stuff 171, for one process; with n, batch_size=32/n keeps 32 images a step."""
