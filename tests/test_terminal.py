"""The command line's manners: JSON, standard input, completion, pictures that open, and silence."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from opensan.checkpoints.presets import PRESETS
from opensan.cli import options as shared
from opensan.files import ASSETS

from .documentation import commands
from .test_evaluate import make_folder
from .test_recipe import recipe_file, squares  # noqa: F401 (fixtures)
from .test_whole_runs import photograph

WORDS = "road, car, sky"
SRC = str(Path(shared.__file__).parents[2])


def opensan(*arguments, **environment):
    """Run a command in a process of its own, as a shell does."""
    environment = {**os.environ, "PYTHONPATH": SRC, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "opensan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_an_image_comes_from_standard_input(tmp_path, model_folder, run, monkeypatch):
    photograph(tmp_path / "a.png")
    options = ("-w", WORDS, "-m", model_folder, "-o", tmp_path / "out", "--json")
    code, stdout, stderr = run("segment", tmp_path / "a.png", *options)
    assert (code, stderr) == (0, "") and stdout.count("\n") == 1
    line = json.loads(stdout)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "a.png").read_bytes())))
    code, stdout, stderr = run("segment", "-", *options)
    assert (code, stderr) == (0, "")
    assert json.loads(stdout)["areas"] == line["areas"] and sum(line["areas"].values()) == pytest.approx(1)
    assert (tmp_path / "out" / "stdin.labels.png").read_bytes() == (tmp_path / "out" / "a.labels.png").read_bytes()
    code, _, stderr = run("segment", "-", tmp_path / "a.png", *options)
    assert code == 2 and "stands alone" in stderr


def test_a_folder_is_a_line_of_json_an_image(tmp_path, model_folder, run):
    for name in ("a.png", "b.png"):
        photograph(tmp_path / "photos" / name)
    code, stdout, stderr = run(
        *("segment", tmp_path / "photos", "-w", WORDS, "-m", model_folder, "-o", tmp_path / "out", "--json")
    )
    assert (code, stderr) == (0, "")
    lines = [json.loads(line) for line in stdout.splitlines()]
    assert [Path(line["image"]).name for line in lines] == ["a.png", "b.png"]
    assert all(Path(file).exists() for line in lines for file in line["files"])


def test_data_and_figures_are_printed_as_json(tmp_path, model_folder, run):
    data = make_folder(tmp_path / "shore")
    code, stdout, _ = run("eval", "--data", data, "-m", model_folder, "-o", tmp_path / "out", "--json")
    (figures,) = json.loads(stdout)
    saved = json.loads((tmp_path / "out" / "shore" / "metrics.json").read_text())
    assert code == 0 and figures["metrics"] == saved["metrics"] and Path(figures["page"]).exists()
    (data / "val.txt").rename(data / "mine.txt")
    code, stdout, _ = run("data", "prepare", "folder", "--source", data, "-o", tmp_path / "prepared", "--json")
    prepared = json.loads(stdout)
    assert code == 0 and prepared["splits"] == {"mine": prepared["images"]} and prepared["left_out"] == {}
    code, stdout, stderr = run("data", "check", tmp_path / "prepared", "--json")
    checked = json.loads(stdout)
    assert (code, stderr, checked["problems"]) == (0, "", []) and checked["classes"] == prepared["classes"]
    next((tmp_path / "prepared" / "images").iterdir()).unlink()
    code, stdout, _ = run("data", "check", tmp_path / "prepared", "--json")
    assert code == 1 and json.loads(stdout)["problems"]


@pytest.mark.parametrize("arguments", [["words"], ["models"], ["data", "list"], ["data", "list", "folder"]])
def test_lists_are_printed_as_json(arguments, run):
    code, stdout, stderr = run(*arguments, "--json")
    assert (code, stderr) == (0, "") and json.loads(stdout)


def test_every_command_that_prints_a_table_has_json():
    without = {
        command.name
        for command in commands()
        if not hasattr(command, "commands") and "--json" not in {name for p in command.params for name in p.opts}
    }
    # The tables of ablations and of depth are in their folders, as CSV; the others print lines.
    expected = {"ablate", "cache", "compact", "convert", "demo", "depth", "push", "remove", "serve", "train", "ui"}
    assert without == expected


def test_the_overlay_opens(tmp_path, model_folder, run, monkeypatch):
    opened = []
    monkeypatch.setattr(typer, "launch", lambda path: opened.append(path) or 0)
    image = photograph(tmp_path / "a.png")
    options = ("-w", WORDS, "-m", model_folder, "-o", tmp_path / "out", "--show")
    assert run("segment", image, *options)[0] == 0
    assert opened == [str(tmp_path / "out" / "a.overlay.png")]
    code, _, stderr = run("segment", image, *options, "--format", "png")
    assert code == 2 and "--show" in stderr
    monkeypatch.setattr(typer, "launch", lambda path: 1)
    code, _, stderr = run("segment", image, *options)
    assert code == 0 and "no program here opens" in stderr and "a.overlay.png" in stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("opensan seg", {"segment", "segment-raster", "segment-video"}),
        ("opensan segment a.jpg --model san-", {"san-vit-b16", "san-vit-l14"}),
        ("opensan segment a.jpg --words-set ade", {"ade20k_150", "ade20k_847"}),
        ("opensan data prepare coco-", {"coco-instances", "coco-panoptic"}),
    ],
)
def test_the_shell_completes(typed, offered):
    words = typed.split()
    done = opensan(_OPENSAN_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(len(words) - 1))
    assert set(done.stdout.split()) == offered, done.stderr


def test_the_models_that_complete_are_those_that_label():
    official = {name for name, preset in PRESETS.items() if preset.official}
    packaged = {path.name for path in (ASSETS / "models").iterdir()}
    assert set(shared.MODELS) == official | packaged


def test_shared_options_are_spelled_alike():
    spellings: dict[str, set] = {}
    for command in commands():
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name in ("out", "model", "words", "as_json", "show"):
                spellings.setdefault(f"{parameter.name}", set()).add((*parameter.opts,))
    assert spellings["out"] == {("--out", "-o")} and spellings["model"] == {("--model", "-m")}
    assert spellings["words"] == {("--words", "-w"), ("--words",)}  # the number of words that `profile` takes
    assert spellings["as_json"] == {("--json",)}


def test_a_training_reports_its_first_step_and_nothing_else_is_printed(recipe_file):  # noqa: F811
    done = opensan("train", recipe_file, "loop.log_every=4")
    assert done.returncode == 0, done.stderr
    steps = re.findall(r"^(\d+)/(\d+).*: loss ", done.stderr, re.MULTILINE)
    assert [int(step) for step, _ in steps] == [1, 4, 6]
    others = [line for line in done.stderr.splitlines() if not re.match(r"(\d+/\d+|step \d+: )", line)]
    assert others == []


def test_a_training_draws_a_bar_on_a_terminal(capsys):
    from opensan.cli.training_bar import TrainingBar

    bar = TrainingBar()
    bar.console.file = io.StringIO()
    bar.console._force_terminal = True
    with bar.begin(10, 4) as progress:
        progress.advance(5)
        progress.show(5, {"loss": 1.5})
        progress.say("an event")
    drawn = bar.console.file.getvalue()
    assert "5/10" in drawn and "loss 1.5" in drawn and "an event" in drawn
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_an_export_prints_nothing_of_its_libraries(tmp_path, model_folder):
    pytest.importorskip("onnxscript", reason="needs the extra `onnx`")
    done = opensan("export", model_folder, "-o", tmp_path / "exported", "-w", WORDS)
    assert (done.returncode, done.stderr) == (0, "") and "differ by" in done.stdout
    done = opensan("segment", photograph(tmp_path / "a.png"), "-w", WORDS, "-m", tmp_path / "exported", "-o", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_pictures_on_standard_input_must_be_pictures(tmp_path, model_folder, run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    code, _, stderr = run("segment", "-", "-w", WORDS, "-m", model_folder, "-o", tmp_path)
    assert code == 1 and stderr.startswith("error: ") and stderr.count("\n") == 1


def test_tiny_says_what_it_knows(monkeypatch):
    said = []
    monkeypatch.setattr(shared, "note", said.append)
    shared.say_what_tiny_knows("tiny", [shared.DRAWN_SCENES / "court.png"])
    shared.say_what_tiny_knows("photo", [Path("kitchen.jpg")])
    assert not said
    shared.say_what_tiny_knows("tiny", [shared.DRAWN_SCENES / "court.png", Path("kitchen.jpg")])
    assert len(said) == 1 and "drawn scenes only" in said[0]
