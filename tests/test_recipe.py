"""A training from one file: what the file says, what is refused, and what a run leaves behind."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from opensan.checkpoints import load_model, save_folder
from opensan.cli import main
from opensan.config import parse_config
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.errors import UserError
from opensan.recipe.config import RECIPES, RecipeConfig, UnlabelledConfig, override, read_recipe
from opensan.recipe.files import RunFolderFiles
from opensan.recipe.run import open_unlabelled
from opensan.recipe.show import to_yaml
from opensan.train.criterion import SetCriterion

CLASSES = ["red", "green", "blue"]


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return exit_.value.code or 0


@pytest.fixture
def squares(tmp_path):
    """A data set of coloured halves: 8 photographs to train on, 4 to validate on."""
    folder = tmp_path / "squares"
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    generator = np.random.default_rng(0)
    names = [f"photo{number}" for number in range(12)]
    for name in names:
        left, right = generator.permutation(3)[:2]
        labels = np.full((72, 96), left, dtype=np.uint8)
        labels[:, 40:] = right
        labels[0] = 255
        pixels = np.eye(3, dtype=np.uint8)[np.minimum(labels, 2)] * 200
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
        Image.fromarray(labels).save(folder / "labels" / f"{name}.png")
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    (folder / "train.txt").write_text("\n".join(names[:8]))
    (folder / "val.txt").write_text("\n".join(names[8:]))
    return folder


@pytest.fixture
def recipe_file(tmp_path, squares, small_model):
    """A recipe that starts a small SAN from CLIP's weights in a file."""
    save_folder(small_model, tmp_path / "small")
    save_file(
        {name: tensor.clone() for name, tensor in small_model.clip.state_dict().items()}, tmp_path / "clip.safetensors"
    )
    recipe = {
        "start": {"model": str(tmp_path / "small"), "clip": str(tmp_path / "clip.safetensors")},
        "data": [{"folder": str(squares)}],
        "validation": {"folder": str(squares), "pictures": 2},
        "loop": {
            "steps": 6,
            "batch_size": 2,
            "validate_every": 3,
            "save_every": 2,
            "log_every": 1,
            "learning_rate": 1e-3,
        },
        "augment": {"short_sides": [64, 96], "crop": [64, 64]},
        "points": {"count": 64},
        "out": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


# The file


@pytest.mark.parametrize("name", RECIPES)
def test_a_preset_printed_in_full_reads_back_and_explains_every_setting(name, tmp_path, capsys):
    assert run("train", "--show", name) == 0
    text = capsys.readouterr().out
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert read_recipe(str(path)) == RECIPES[name]
    assert all("  # " in line or line.startswith("#") for line in text.splitlines())


@pytest.mark.parametrize("name", RECIPES)
def test_presets_are_the_official_recipe(name):
    recipe = RECIPES[name]
    assert (recipe.start.model, recipe.start.weights, recipe.start.clip) == (name, "clip", "openai")
    loop = recipe.loop
    assert (loop.steps, loop.batch_size, loop.accumulate, loop.warmup) == (60_000, 32, 1, 0)
    assert (loop.learning_rate, loop.weight_decay, loop.poly_power, loop.clip_norm) == (1e-4, 1e-4, 0.9, 0.01)
    assert loop.precision == "auto"
    augment = recipe.augment
    assert augment.short_sides == (320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960)
    assert (augment.crop, augment.flip, augment.colour_jitter) == ((640, 640), 0.5, True)
    assert recipe.points.model_dump() == {"count": 12_544, "oversampling": 3.0, "importance": 0.75}
    assert recipe.loss_weights.model_dump() == {"classification": 2.0, "mask": 5.0, "dice": 5.0}
    assert recipe.no_object_weight == 0.1


def test_overrides_reach_every_place():
    recipe = override(
        RECIPES["san-vit-b16"],
        [
            "loop.learning_rate=2e-5",
            "augment.crop=[320, 352]",
            "data.0.folder=streets",
            "data.1.folder=rooms",
            "data.1.weight=0.5",
            "validation=null",
            "loop.validate_every=0",
            "loggers=[wandb]",
        ],
    )
    assert recipe.loop.learning_rate == 2e-5
    assert recipe.augment.crop == (320, 352)
    assert [(str(one.folder), one.weight) for one in recipe.data] == [("streets", 1.0), ("rooms", 0.5)]
    assert recipe.validation is None and recipe.loggers == ("wandb",)
    again = override(recipe, ["validation.folder=rooms", "loop.validate_every=10"])
    assert str(again.validation.folder) == "rooms" and again.validation.split == "val"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loop.stepz=3", r"loop\.stepz: no such key \(the nearest is loop\.steps\)"),
        ("steps=3", r"steps: no such key \(the nearest is loop\.steps\)"),
        ("data.0.foldr=x", r"data\.0\.foldr: no such key \(the nearest is data\.folder\)"),
        ("loop.qqqqq=x", r"loop\.qqqqq: no such key \(known: steps, batch_size, .*\)"),
        ("loop.steps=-1", r"loop\.steps: .*greater than 0, not -1"),
        ("loop.steps=many", r"loop\.steps: .*, not 'many'"),
        ("data.3.folder=x", "a list of 1 has no element '3'"),
        ("loop.steps.x=1", r"loop\.steps: .*valid integer"),
        ("augment.crop=[1,2", "not valid YAML"),
        ("loop.steps", "form key=value"),
        ("loggers=[print]", "tensorboard"),
        ("validation=null", "give both or neither"),
        ("data=[]", "names no training set"),
    ],
)
def test_a_wrong_override_is_told_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        override(RECIPES["san-vit-b16"], [text])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("loop: {steps: 3", r"line 1: "),
        ("- loop", "`key: value` lines"),
        ("out: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("out: x\n", "data: Field required"),
        ("data: [{folder: x}]\nout: y\nlooop: {}\n", r"looop: no such key \(the nearest is loop\)"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_recipe(str(path))
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_file_that_is_not_there(capsys):
    assert run("train", "nothing.yaml") == 1
    assert "nothing.yaml: not a readable configuration (No such file" in capsys.readouterr().err
    assert run("train") == 2
    assert "san-vit-l14" in capsys.readouterr().err


def test_what_is_missing_is_told_before_anything_is_trained(tmp_path, recipe_file, squares, capsys, monkeypatch):
    def refused(*overrides) -> str:
        assert run("train", recipe_file, *overrides) == 1
        return capsys.readouterr().err.splitlines()[-1]

    assert "nowhere/classes.txt: does not exist" in refused("data.0.folder=nowhere")
    assert "test.txt: does not exist" in refused("validation.split=test")
    assert "has no class sky to ignore" in refused("data.0.ignored=[sky]")
    (squares / "empty.txt").write_text("\n")
    assert "empty.txt: lists no image" in refused("data.0.split=empty")
    assert "augment.crop (64, 65): both sides must be multiples of 32" in refused("augment.crop=[64,65]")
    assert "start.model: no preset 'san'" in refused("start.model=san")
    assert "OpenAI has no CLIP" in refused("start.clip=openai")
    assert "cannot be used here" in refused("device=warp")
    with monkeypatch.context() as patch:
        patch.setattr("opensan.recipe.run.checked_device", torch.device)
        assert "train on cuda" in refused("device=mps")
    (tmp_path / "file").touch()
    assert "cannot write there" in refused(f"out={tmp_path}/file/run")
    assert not (tmp_path / "run" / "log.csv").exists()


# The run


def rows(path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("written", ["", "step,lo", "step,loss\n", "step,loss\n1,2.5\n2,2.", "step,loss\n1,2.5\n2"])
def test_a_log_that_a_full_disk_cut_off_hides_no_error(tmp_path, recipe_file, written):
    files = RunFolderFiles(read_recipe(str(recipe_file)).model_copy(update={"out": tmp_path}))
    files.start(0)
    (tmp_path / "log.csv").write_text(written)
    files.close()
    assert Image.open(tmp_path / "curves.png").width > 500


def test_a_run_leaves_its_log_pictures_and_a_model_and_goes_on_by_the_same_command(
    tmp_path, recipe_file, small_model, capsys
):
    out = tmp_path / "run"
    assert run("train", recipe_file) == 0
    told = capsys.readouterr().out
    assert f"{out}: 6 steps, best mIoU" in told and f"--model {out / 'model'}" in told
    assert len(rows(out / "log.csv")) == 1 + 6 and len(rows(out / "validation.csv")) == 1 + 2
    assert read_recipe(str(out / "recipe.yaml")) == read_recipe(str(recipe_file))
    assert json.loads((out / "config.json").read_text())["loop"]["steps"] == 6
    for step in (3, 6):
        assert Image.open(out / "validation" / f"step-{step:08d}.png").width > 3 * 300
    assert Image.open(out / "curves.png").width > 500

    model = load_model(out / "model")
    assert torch.equal(model.clip.visual.proj, small_model.clip.visual.proj)  # frozen
    assert not torch.equal(model.clip.visual.positional_embedding, small_model.clip.visual.positional_embedding)
    [best] = (out / "checkpoints").glob("best-*.pt")
    saved = torch.load(best, weights_only=True)
    for name, parameter in saved["parameters"].items():
        assert torch.equal(model.get_parameter(name), parameter), name

    photograph = tmp_path / "squares" / "images" / "photo9.png"
    assert (
        run("segment", photograph, "--words", "red,green", "--model", out / "model", "--out", tmp_path / "found") == 0
    )
    capsys.readouterr()
    log = (out / "log.csv").read_bytes()
    assert run("train", recipe_file) == 0
    assert "after step 6" in capsys.readouterr().err
    assert (out / "log.csv").read_bytes() == log
    assert run("train", recipe_file, "loop.learning_rate=0.1") == 1
    assert "holds a run with loop.learning_rate = 0.001, not 0.1" in capsys.readouterr().err
    assert read_recipe(str(out / "recipe.yaml")).loop.learning_rate == 1e-3


def test_another_clip_does_not_continue_a_run(tmp_path, recipe_file, small_model, capsys):
    assert run("train", recipe_file, "loop.steps=2", "validation=null", "loop.validate_every=0") == 0
    state = {name: tensor + 0.01 for name, tensor in small_model.clip.state_dict().items()}
    save_file(state, tmp_path / "clip.safetensors")
    assert run("train", recipe_file, "loop.steps=2", "validation=null", "loop.validate_every=0") == 1
    assert "holds a run with clip = " in capsys.readouterr().err


def test_without_validation_the_last_model_is_kept_and_the_start_may_be_a_model(tmp_path, recipe_file, capsys):
    settings = ["start.weights=model", "start.keep=0", "loop.steps=2", "validation=null", "loop.validate_every=0"]
    assert run("train", recipe_file, *settings) == 0
    out = tmp_path / "run"
    assert "best" not in capsys.readouterr().out and not (out / "validation").exists()
    [last] = (out / "checkpoints").glob("step-00000002-*.pt")
    parameters = torch.load(last, weights_only=True)["parameters"]
    model = load_model(out / "model")
    assert all(torch.equal(model.get_parameter(name), parameter) for name, parameter in parameters.items())


def test_random_weights_are_never_silent(recipe_file, capsys):
    settings = ["start.weights=random", "loop.steps=1", "validation=null", "loop.validate_every=0"]
    assert run("train", recipe_file, *settings) == 0
    assert "will learn nothing" in capsys.readouterr().err


def test_losses_that_are_not_finite_end_in_one_line(recipe_file, capsys, monkeypatch):
    monkeypatch.setattr(SetCriterion, "_class_loss", lambda _, output, *__: output.class_logits.sum() * float("inf"))
    settings = ["validation=null", "loop.validate_every=0"]
    assert run("train", recipe_file, *settings) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: 3 steps in a row had no finite losses")


@pytest.mark.slow
def test_torchrun(tmp_path, recipe_file):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "opensan", "train", str(recipe_file), "loop.steps=3", "loop.batch_size=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "run"
    assert done.stdout.count("use it with: opensan segment") == 1
    assert len(rows(out / "log.csv")) == 1 + 3 and (out / "validation" / "step-00000003.png").exists()
    assert load_model(out / "model").config.name == "small"


def test_the_whole_configuration_survives_its_own_print(recipe_file):
    recipe = read_recipe(str(recipe_file), ["loggers=[mlflow, tensorboard]", "loop.clip_norm=null"])
    assert parse_config(RecipeConfig, yaml.safe_load(to_yaml(recipe)), "printed") == recipe


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("loop.steps=!!bool maybe", "loop.steps"),
        ("loop.steps=!!int ''", "loop.steps"),
        ("loop.steps=2024-13-45", "loop.steps"),
        ("loop.steps=" + 3000 * "[", "loop.steps"),
        ("a" + 1500 * ".a" + "=1", "a.a.a"),
        ("loop.steps=0x" + 5000 * "f", "loop.steps"),
        ("loop={steps: 1, steps: 2}", "steps"),
        ("loop.steps=&a [*a]", "loop.steps"),
        ("loop=!!map [1]", "loop"),
        ("data.999999999999=1", "data.999999999999"),
    ],
)
def test_no_override_ends_in_a_traceback(recipe_file, capsys, text, key):
    code, stderr = run("train", recipe_file, text, "--show"), capsys.readouterr().err
    assert code == 1 and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert key in stderr and len(stderr) < 400


@pytest.mark.parametrize(
    "value", ["!!bool maybe", "!!int ''", "!!timestamp foo", "2024-13-45", 5000 * "7", "!!float x", "!!python/name:os"]
)
def test_no_value_of_a_recipe_ends_in_a_traceback(tmp_path, capsys, value):
    path = tmp_path / "wrong.yaml"
    path.write_text(f"data:\n  - {{folder: set}}\nout: run\nloop:\n  seed: 3\n  steps: {value}\n")
    code, stderr = run("train", path, "--show"), capsys.readouterr().err
    assert code == 1 and stderr.count("\n") == 1
    assert stderr.startswith(f"error: {path}: loop.steps: ") and len(stderr) < 400


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("data:\n  - {folder: set}\nout: run\nloop: {steps: 3}\nloop: {batch_size: 2}\n")
    with pytest.raises(UserError, match=r"twice\.yaml: loop: stands there twice"):
        read_recipe(str(path))


def test_a_date_is_text(tmp_path):
    path = tmp_path / "dated.yaml"
    path.write_text("data:\n  - {folder: 2024-01-05}\nout: 2024-13-45\n")
    recipe = read_recipe(str(path))
    assert (str(recipe.data[0].folder), str(recipe.out)) == ("2024-01-05", "2024-13-45")


def test_two_hundred_recipes_of_the_fuzz():
    from fuzz_recipes import fuzz

    assert fuzz(200, seed=1).keys() <= {"read", "refused"}


# Images without labels


@pytest.fixture
def more_squares(squares, tmp_path):
    """The squares' photographs without labels, in a folder of their own."""
    folder = tmp_path / "more"
    folder.mkdir()
    for path in sorted((squares / "images").iterdir())[:5]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_images_without_labels_are_trained_on_beside_the_labelled_ones(tmp_path, recipe_file, more_squares, capsys):
    settings = [
        "start.weights=model",
        f"unlabelled=[{{folder: {more_squares}, weight: 3}}]",
        "self_training={confidence: 0.2, ramp_up: 4}",
    ]
    assert run("train", recipe_file, *settings) == 0
    out = tmp_path / "run"
    header, *lines = rows(out / "log.csv")
    shares = [float(line[header.index("pseudo_labelled")]) for line in lines]
    assert any(0 < share <= 1 for share in shares) and any(np.isnan(share) for share in shares)  # by turns
    record = json.loads((out / "model" / "training.json").read_text())
    assert record["unlabelled"] == [{"name": "more", "images": 5, "classes": CLASSES, "weight": 3.0}]
    assert record["settings"]["unlabelled"][0]["folder"] == "more"
    assert str(tmp_path) not in json.dumps(record)
    capsys.readouterr()
    assert run("train", recipe_file, *settings, "self_training.confidence=0.3") == 1
    assert "holds a run with self_training.confidence = 0.2, not 0.3" in capsys.readouterr().err


def test_what_is_wrong_with_images_without_labels_is_told_in_one_line(tmp_path, recipe_file, more_squares, capsys):
    def refused(*overrides) -> str:
        assert run("train", recipe_file, *overrides) == 1
        return capsys.readouterr().err.splitlines()[-1]

    (tmp_path / "nothing").mkdir()
    assert "nothing: no images in this folder" in refused(f"unlabelled=[{{folder: {tmp_path}/nothing}}]")
    assert "nowhere: does not exist" in refused("unlabelled=[{folder: nowhere}]")
    other = ["data.1.folder=" + str(tmp_path / "squares"), "data.1.ignored=[red]"]
    assert "the training sets have different classes" in refused(f"unlabelled=[{{folder: {more_squares}}}]", *other)
    assert "one word gets every pixel" in refused(f"unlabelled=[{{folder: {more_squares}, words: [sky]}}]")
    assert "unlabelled.0.folder: Field required" in refused("unlabelled=[{words: [sky, road]}]")
    assert "knows words alone" in refused(f"unlabelled=[{{folder: {more_squares}}}]", "objects=true")
    assert "self_training.confidence: " in refused("self_training.confidence=2")
    assert "loop.patience counts validations" in refused("validation=null", "loop.validate_every=0", "loop.patience=2")
    assert not (tmp_path / "run" / "log.csv").exists()


def test_words_of_images_without_labels_come_from_a_list_or_a_file(tmp_path, squares, more_squares):
    labelled = [SegmentationFolder(squares, "train")]
    words = tmp_path / "words.txt"
    words.write_text("car|taxi\nsky\n")
    for given in (("car|taxi", "sky"), words):
        folder = open_unlabelled(UnlabelledConfig(folder=more_squares, words=given), labelled)
        assert folder.vocabulary.names == ["car", "sky"] and len(folder) == 5
    assert open_unlabelled(UnlabelledConfig(folder=more_squares), labelled).vocabulary == labelled[0].vocabulary


def test_patience_ends_a_training_and_the_same_command_stays_ended(tmp_path, recipe_file, capsys, monkeypatch):
    monkeypatch.setattr(
        "opensan.recipe.run._validation", lambda *_: (lambda step: {"miou": 1 / step if step > 1 else 2.0}, None)
    )
    settings = ["loop.validate_every=1", "loop.patience=2", "loop.save_every=100", "loop.steps=50"]
    assert run("train", recipe_file, *settings) == 0
    captured = capsys.readouterr()
    assert "ended after step 3: no better score since step 1" in captured.err
    assert "3 steps, best mIoU 200.00 % after step 1" in captured.out
    log = (tmp_path / "run" / "log.csv").read_bytes()
    assert run("train", recipe_file, *settings) == 0
    assert "3 steps" in capsys.readouterr().out and (tmp_path / "run" / "log.csv").read_bytes() == log
    assert run("train", recipe_file, *settings, "loop.patience=3") == 0  # it changes no number, only the end
    assert "4 steps" in capsys.readouterr().out
