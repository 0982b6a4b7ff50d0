"""Run a training from its configuration and write the trained model's folder."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.Image import Image

from opensan.buckets import BucketPath, bucket_path
from opensan.checkpoints import load_model, preset_config, save_folder
from opensan.checkpoints.clip_weights import san_around_clip
from opensan.config import CONFIG_NAME, ModelConfig, read_config
from opensan.data.dataset import SegmentationDataset
from opensan.data.prepare.own_images import NO_SPLIT
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.data.shards import INDEX, ShardedSet, is_sharded
from opensan.data.unlabelled import UnlabelledFolder
from opensan.devices import checked_device
from opensan.distributed import is_main, on_main, process_group
from opensan.errors import UserError
from opensan.evaluation.evaluation import Predictor, dataset_predictor, validation
from opensan.model import SAN, build_san
from opensan.outputs import check_writable
from opensan.outputs.panel import PanelRow, panel
from opensan.recipe.blend import Blend
from opensan.recipe.config import DataConfig, RecipeConfig, StartConfig, TrainingDataConfig, UnlabelledConfig
from opensan.recipe.few_images import with_few_images
from opensan.recipe.files import RunFolderFiles
from opensan.recipe.record import write_record
from opensan.train.checkpoint import CheckpointFolder
from opensan.train.log import TrainingProgress
from opensan.train.loop import RunResult, load_parameters
from opensan.train.optimizer import san_parameter_groups
from opensan.train.san import train_san
from opensan.train.trackers import make_trackers
from opensan.vocabulary import Vocabulary


@dataclass(frozen=True)
class SavedModel:
    """The model folder that a finished run wrote."""

    folder: Path
    step: int
    """The training step of its weights: the best validation's if there were any, else the last."""


def run_recipe(recipe: RecipeConfig, progress: TrainingProgress | None = None) -> tuple[RunResult, SavedModel | None]:
    """Train as `recipe` says, resuming an earlier run; under torchrun together with the other processes.

    A finished run leaves a model folder, `recipe.out`/model. `progress` reports the training; None: lines on stderr.

    Raises:
        ValueError: one line, before anything is trained: folders, lists, classes, sizes, weights or packages.
        HubError: a hub did not provide the weights.
        Diverged: see `opensan.train.loop.Trainer.run`.
    """
    with process_group(_device(recipe.device)) as group:
        data = [(open_data(with_a_list(source)), source.weight) for source in recipe.data]
        labelled = [folder for folder, _ in data]
        unlabelled = [(open_unlabelled(source, labelled), source.weight) for source in recipe.unlabelled]
        held_out = open_data(recipe.validation) if recipe.validation else None
        on_main(lambda: check_writable(recipe.out))
        model = start_model(recipe.start, recipe.loop.seed).to(group.device)
        recipe, few = with_few_images(recipe, sum(len(folder) for folder, _ in data), model.config.image)
        if few is not None and is_main():
            (progress or TrainingProgress()).say(few)
        trackers = make_trackers(recipe.loggers, recipe.out, recipe.project, recipe.model_dump(mode="json"))
        blend = Blend(model, recipe.start.keep)
        validate, pictures = _validation(model, held_out, recipe, blend) if held_out else (None, None)
        result = train_san(
            model,
            data,
            recipe.training(),
            recipe.out,
            device=group.device,
            validate=validate,
            loggers=[RunFolderFiles(recipe), *trackers],
            panel=pictures,
            progress=progress,
            unlabelled=unlabelled,
        )
        saved = (
            on_main(lambda: _save_model(model, recipe, blend, data, unlabelled, held_out)) if result.finished else None
        )
    return result, saved


def _device(name: str) -> torch.device:
    device = checked_device(name)
    if device.type == "mps":
        raise UserError("device mps: torch has neither float64 nor the gradient of grid_sample there; train on cuda")
    return device


def with_a_list(config: TrainingDataConfig) -> TrainingDataConfig:
    """Return the training set with the list `all` where that is its only list, as in sets prepared without lists."""
    folder = config.folder.expanduser()
    if is_sharded(bucket_path(folder) or folder, config.split):
        return config
    if (folder / f"{config.split}.txt").exists() or not (folder / f"{NO_SPLIT}.txt").exists():
        return config
    warnings.warn(f"{folder}: has no list {config.split}.txt: training on all images, {NO_SPLIT}.txt", stacklevel=2)
    return config.model_copy(update={"split": NO_SPLIT})


def open_data(config: DataConfig) -> SegmentationFolder | ShardedSet:
    """Open the split that `config` names, a folder or shards. Raises UserError if it does not exist or is empty."""
    root = bucket_path(config.folder) or config.folder.expanduser()
    if is_sharded(root, config.split):
        shards = ShardedSet(root, config.split, ignored=config.ignored)
        if len(shards) == 0:
            raise UserError(f"{root}: the shards of {config.split} are empty")
        return shards
    if isinstance(root, BucketPath):
        raise UserError(f"{root}: has no {config.split}{INDEX}; `opensan data shards` makes shards for a bucket")
    folder = SegmentationFolder(config.folder.expanduser(), config.split, ignored=config.ignored)
    if len(folder) == 0:
        raise UserError(f"{config.folder / config.split}.txt: lists no image that exists")
    return folder


def open_unlabelled(config: UnlabelledConfig, labelled: Sequence[SegmentationDataset]) -> UnlabelledFolder:
    """Open images without labels, with the words of `config`, or those of all `labelled` sets if they agree.

    Raises UserError, one line, if there is no image, or no words.
    """
    if config.words is None:
        words, *others = [data.vocabulary for data in labelled]
        if any(other.words != words.words for other in others):
            raise UserError(
                f"unlabelled: {config.folder}: the training sets have different classes: give the words that the "
                'teacher labels these images with, as words: ["road", "car|taxi"], or as a word file'
            )
    elif isinstance(config.words, Path):
        words = Vocabulary.from_file(config.words.expanduser())
    else:
        words = Vocabulary.parse(list(config.words))
    if len(words.words) < 2:
        raise UserError(f"unlabelled: {config.folder}: one word gets every pixel: name what else is there")
    return UnlabelledFolder(config.folder.expanduser(), words)


def start_model(start: StartConfig, seed: int) -> SAN:
    """Return the model that training starts from, on the CPU.

    Raises:
        ValueError: no such model or weights, or they do not fit together; one line.
        HubError: a hub did not provide the weights.
    """
    if start.weights == "model":
        return load_model(start.model)
    config = _start_config(start.model)
    if start.weights == "clip":
        return san_around_clip(config, start.clip, seed=seed)
    warnings.warn(f"start.weights=random: CLIP is untrained, so {config.name} will learn nothing", stacklevel=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_san(config)


def _start_config(name: str) -> ModelConfig:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return read_config(folder / CONFIG_NAME)
    try:
        return preset_config(name)
    except UserError as error:
        raise UserError(f"start.model: {error}, or a model folder") from None


def _validation(
    model: SAN, held_out: SegmentationDataset, recipe: RecipeConfig, blend: Blend
) -> tuple[Callable[[int], Mapping[str, float]], Callable[[int], Mapping[str, Image]] | None]:
    """Return the function that validates the model, and the one that draws its predictions (None for no pictures)."""
    config = recipe.validation
    assert config is not None  # it names the data set `held_out`
    measure = validation(model, held_out, limit=config.limit)

    def validate(step: int) -> Mapping[str, float]:
        if not is_main():
            return {}
        with blend.applied():  # of what would be saved
            return measure(step)

    if config.pictures == 0:
        return validate, None
    predict = dataset_predictor(model, held_out)
    count = config.pictures

    def pictures(_step: int) -> Mapping[str, Image]:
        with blend.applied():
            return _panel(predict, held_out, count)

    return validate, pictures


def _panel(predict: Predictor, held_out: SegmentationDataset, count: int) -> dict[str, Image]:
    """Draw predictions for `count` images, spread evenly over the data set: the same images at every call."""
    count = min(count, len(held_out))
    rows = []
    for index in (number * len(held_out) // count for number in range(count)):
        try:
            image, truth = held_out[index]
        except (UserError, OSError):  # the evaluation has reported this image
            continue
        rows.append(PanelRow(held_out.name(index), image, truth, predict(image)))
    return {"validation": panel(rows, held_out.vocabulary.names)} if rows else {}


def _save_model(
    model: SAN,
    recipe: RecipeConfig,
    blend: Blend,
    data: Sequence[tuple[SegmentationFolder | ShardedSet, float]],
    unlabelled: Sequence[tuple[UnlabelledFolder, float]],
    held_out: SegmentationFolder | ShardedSet | None,
) -> SavedModel:
    """Write the best model of the run if validations marked one, else the last, and how it was trained."""
    step = recipe.loop.steps
    best = None
    try:
        best = CheckpointFolder(recipe.out / "checkpoints", recipe.loop.keep).load_best()
    except UserError as error:
        warnings.warn(f"{error}: the last model is kept in place of the best", stacklevel=2)
    if best:
        load_parameters(san_parameter_groups(model), best["parameters"], str(recipe.out))
        step = best["step"]
    blend.apply()
    saved = SavedModel(save_folder(model, recipe.out / "model"), step)
    write_record(model, recipe, step, data, unlabelled, held_out)
    return saved
