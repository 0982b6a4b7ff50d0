"""The README is run: its commands and its Python, with a small random model in place of the official weights."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main
from PIL import Image

from opensan.checkpoints import save_folder
from opensan.cli import app, main
from opensan.vocabulary import Vocabulary, ready_sets

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


IN_ORDER = ("data", "train", "eval")
"""Commands of which each needs what the one before it left."""


def commands(program: str) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    return [line[1:] for line in lines if line and line[0] == program]


@pytest.fixture(scope="session")
def model_folder(small_model, tmp_path_factory) -> str:
    return str(save_folder(small_model, tmp_path_factory.mktemp("readme-model")))


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A folder with what the README's reader is supposed to have."""
    desk = tmp_path / "desk"
    for name in ("street.jpg", "a.jpg", "b.jpg", "photos/one.jpg", "photos/deep/two.png", "more/street.jpg"):
        (desk / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 20).convert("RGB").save(desk / name)
    photographs = desk / "street-photographs"
    for name, mode in (("images", "RGB"), ("labels", "L")):
        (photographs / name).mkdir(parents=True)
        Image.new(mode, (96, 64)).save(photographs / name / "one.png")
    (photographs / "classes.txt").write_text("road\nsky\n")
    for split in ("train", "val"):
        (photographs / f"{split}.txt").write_text("one\n")
    (desk / "words.txt").write_text("road\ncar | taxi  # a comment\n")
    (desk / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(desk)
    return desk


@pytest.mark.parametrize("arguments", [one for one in commands("opensan") if one[0] not in IN_ORDER], ids=" ".join)
def test_command_runs(desk, capsys, model_folder, arguments):
    if arguments[0] == "convert":
        pytest.skip("needs the official weights; convert has tests of its own")
    if arguments[0] == "segment":
        # Later options win: the small model, and the device that every machine has.
        arguments = [*arguments, "--model", model_folder, "--device", "cpu"]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    output = capsys.readouterr()
    assert (caught.value.code or 0, output.err) == (0, "")
    assert output.out
    if arguments[0] == "segment":
        folder = desk / (arguments[arguments.index("--out") + 1] if "--out" in arguments else "out")
        assert list(folder.rglob("*.labels.png")) and list(folder.rglob("*.json"))


def test_data_training_and_measuring_run(desk, capsys, model_folder):
    (recipe,) = blocks("yaml")
    short = re.sub("loop: .*", "loop: {steps: 1, batch_size: 1, validate_every: 1, workers: 0}", recipe)
    crops = "augment: {short_sides: [64], crop: [64, 64]}\n"
    (desk / "street.yaml").write_text(short.replace("san-vit-b16", model_folder) + crops)
    for arguments in commands("opensan"):
        if arguments[0] in IN_ORDER:
            with pytest.raises(SystemExit) as caught:
                main(arguments)
            assert not caught.value.code, capsys.readouterr().err
    assert (desk / "runs" / "street" / "model" / "config.json").exists()
    assert (desk / "evaluation" / "street" / "metrics.json").exists()


@pytest.mark.parametrize("arguments", commands("opensan"), ids=" ".join)
def test_command_parses(arguments):
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    command.make_context(name, arguments)


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.splitlines()[-1])
def test_python_runs(desk, model_folder, block):
    assert '"san-vit-b16"' in block
    exec(compile(block.replace('"san-vit-b16"', repr(model_folder)), "README.md", "exec"), {})


def test_files_are_named_as_told(desk, capsys, model_folder):
    with pytest.raises(SystemExit):
        main(["segment", "street.jpg", "--words", "road, sky", "--model", model_folder])
    told = re.findall(r"^\| `(street\.\S+)` \|", README, flags=re.MULTILINE)
    assert sorted(told) == sorted(path.name for path in (desk / "out").iterdir())


def test_options_in_the_text_exist():
    known = {
        option
        for command in typer.main.get_command(app).commands.values()
        for parameter in command.params
        for option in parameter.opts
    }
    shown = set(re.findall(r"--[a-z][a-z-]+", "".join(re.findall(r"`[^`\n]+`", README))))
    assert shown and shown <= known


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {arguments[0] for arguments in commands("make")} == {"demo", "test"}
    for target, *_ in commands("make"):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_json_is_a_vocabulary():
    assert [Vocabulary.parse(json.loads(block)).names for block in blocks("json")] == [["road", "car"]]


def test_number_of_label_sets():
    assert len(ready_sets()) == 6 and "Six label sets" in README


def test_links_into_the_repository_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert {"LICENSE", "docs/overlay.png"} <= set(targets)
    for target in targets:
        assert (ROOT / target).exists(), target
