"""The settings of a fine-tuning on few images: when they apply, what they keep, and that they say so."""

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from opensan.checkpoints import load_model
from opensan.config import ImageConfig
from opensan.recipe.blend import Blend
from opensan.recipe.config import RecipeConfig, StartConfig, TrainingDataConfig, override
from opensan.recipe.few_images import MOST_IMAGES, SETTINGS, with_few_images
from opensan.train.config import LoopConfig

from .test_recipe import recipe_file, run, squares  # noqa: F401 (fixtures)

SIZES = ImageConfig(short_side=192, long_side=768, size_divisor=32)


def fine_tuning(**more) -> RecipeConfig:
    start = StartConfig(model="tiny", weights="model")
    return RecipeConfig(start=start, data=(TrainingDataConfig(folder=Path("own")),), out=Path("run"), **more)


def test_few_images_get_their_settings_and_a_line():
    recipe, line = with_few_images(fine_tuning(), 12, SIZES)
    assert recipe.start.keep == SETTINGS["start.keep"]
    assert recipe.loop.learning_rate == SETTINGS["loop.learning_rate"]
    assert recipe.loop.steps == SETTINGS["loop.steps"]
    assert recipe.augment.crop == (192, 192)
    assert min(recipe.augment.short_sides) < 192 < max(recipe.augment.short_sides)
    assert line is not None
    assert line.startswith("12 training images, few: ")
    assert all(f"{key} {value}" in line for key, value in SETTINGS.items())
    assert "\n" not in line


def test_what_the_recipe_gives_stays():
    given = fine_tuning(loop=LoopConfig(steps=7, learning_rate=1e-4))  # 1e-4 is the default's value too
    recipe, line = with_few_images(given, 12, SIZES)
    assert (recipe.loop.steps, recipe.loop.learning_rate) == (7, 1e-4)
    assert recipe.loop.batch_size == SETTINGS["loop.batch_size"]
    assert line is not None
    assert "steps" not in line
    overridden = override(fine_tuning(), ["loop.learning_rate=0.5", "start.keep=0"])
    recipe, _ = with_few_images(overridden, 12, SIZES)
    assert (recipe.loop.learning_rate, recipe.start.keep) == (0.5, 0)
    assert recipe.loop.steps == SETTINGS["loop.steps"]
    assert with_few_images(recipe, 12, SIZES) == (recipe, None)  # nothing is missing any more


def test_many_images_and_new_models_keep_the_official_recipe():
    assert with_few_images(fine_tuning(), MOST_IMAGES + 1, SIZES) == (fine_tuning(), None)
    from_clip = fine_tuning().model_copy(update={"start": StartConfig(model="tiny")})
    assert with_few_images(from_clip, 12, SIZES) == (from_clip, None)


def test_a_blend_keeps_its_share_and_goes_away_without_a_trace(small_model):
    model = copy.deepcopy(small_model)
    blend = Blend(model, 0.25)
    name = "side_adapter.query_embedding"
    start = model.get_parameter(name).detach().clone()
    with torch.no_grad():
        for parameter in model.trained():
            parameter.parameter.add_(0.1 * torch.randn_like(parameter.parameter))
    moved = {parameter.name: parameter.parameter.detach().clone() for parameter in model.trained()}
    with blend.applied():
        expected = 0.25 * start + 0.75 * moved[name]
        assert torch.allclose(model.get_parameter(name), expected, atol=1e-6)
    assert all(torch.equal(model.get_parameter(name), values) for name, values in moved.items())
    blend.apply()
    assert not torch.equal(model.get_parameter(name), moved[name])


def test_training_on_few_images_says_so_and_saves_the_blend(tmp_path, recipe_file, capsys):  # noqa: F811
    settings = ["start.weights=model", "loop.steps=2", "validation=null", "loop.validate_every=0"]
    assert run("train", recipe_file, *settings) == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if "training images, few" in line)
    assert line.startswith("8 training images")
    assert "start.keep 0.7" in line
    assert "learning_rate" not in line  # the file gives it
    before, after = load_model(tmp_path / "small"), load_model(tmp_path / "run/model")
    [last] = (tmp_path / "run/checkpoints").glob("step-00000002-*.pt")
    trained = torch.load(last, weights_only=True)["parameters"]
    for name, values in trained.items():
        mean = 0.7 * before.get_parameter(name) + 0.3 * values
        assert torch.allclose(after.get_parameter(name), mean, atol=1e-6), name
    assert any(not torch.equal(before.get_parameter(name), values) for name, values in trained.items())
    assert "keep: 0.7" in (tmp_path / "run/recipe.yaml").read_text()
    assert run("train", tmp_path / "run/recipe.yaml") == 0  # all settings stand in it, so that the run is the same
    assert "training images, few" not in capsys.readouterr().err


def test_validations_measure_the_blend(tmp_path, recipe_file, monkeypatch):  # noqa: F811
    blended = []
    monkeypatch.setattr(Blend, "applied", lambda self: blended.append(self.keep) or nullcontext())
    assert run("train", recipe_file, "start.weights=model", "loop.steps=1", "loop.validate_every=1") == 0
    assert blended == [0.7, 0.7]  # the figures, and the pictures


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["start.keep=0.5"], "with `weights: model` alone"),
        (["start.keep=0.5", "start.weights=model", "loop.parallel=fsdp"], "leave loop.parallel at ddp"),
        (["start.keep=1", "start.weights=model"], "start.keep"),
    ],
)
def test_a_share_that_cannot_be_kept_is_told_in_one_line(recipe_file, capsys, wrong, message):  # noqa: F811
    assert run("train", recipe_file, *wrong) == 1
    assert message in capsys.readouterr().err
