"""The README and the pages of docs/: their blocks, and how each kind is run or, where that cannot be, checked."""

import argparse
import ast
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer.main

import opensan
from opensan.cli import app, main
from opensan.vocabulary import Vocabulary

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}

NOT_RUN = {
    r"pip install .*": "changes the environment",
    r"make .*": "sets up an environment",
    r"opensan --install-completion": "changes the shell's settings",
    r"docker .*": "needs Docker",
    r"pytest .*": "runs with the other tests",
    r"opensan .*--on ray.*": "needs Ray: tests/test_on_ray.py",
    r"opensan .*(?:s3|gs)://.*": "needs a bucket: tests/test_buckets.py, tests/test_shards.py",
    r"opensan segment @list\.parquet .*": "needs a list: tests/test_buckets.py",
    r"opensan lab ablate --seeds 3 .*": "takes hours; a smaller one is run",
    r"torchrun .*": "starts processes: tests/test_trainer_parallel.py and tests/test_evaluate.py have several",
    r"python bench/.*": "takes minutes",
    r"python -m opensan\.lab\..*": "takes hours",
    r"opensan train san-vit-.*": "needs COCO-Stuff 171",
    r"opensan adapt .*": "takes minutes, and may end without a model: tests/test_adapt.py",
    r"opensan .* --model adapted/model.*": "needs what `opensan adapt` wrote",
}
"""Commands that a test cannot run, and why. They are checked instead: programs, files and options exist."""

HEAVY = {"fiftyone"}
"""Libraries that no extra installs. Where one is missing, what a page does with it is not run; tests/ have it too."""

NOT_FOLLOWED = {"docs/results.md": "reports what took minutes to hours, on data that is not in the repository"}
"""Pages of which every command is only checked."""

SMALLER = {
    "--device cuda": "--device cpu",
    'device="cuda"': 'device="cpu"',
    "steps: 20000": "steps: 1",
    "batch_size: 8": "batch_size: 1",
    "validate_every: 1000": "validate_every: 1",
    "\naugment: {short_sides: [240], crop: [192, 192]}": "",
    "\nout: runs/": "\naugment: {short_sides: [64], crop: [64, 64]}\nout: runs/",
    "--size 640x640": "--size 64x64",
    "steps: 20,": "steps: 1,",
    " --show\n": "\n",  # opens a window
    " tests/goldens/train_tiny.npz": "",  # tests/test_training_golden.py has it
    "--max-time 300": "--max-time 10 --no-color",
}
"""What is replaced before a block is run, for every machine and within seconds."""


@dataclass(frozen=True)
class Block:
    """Fenced text; `title` is the file that the reader is to write it to."""

    page: str
    line: int
    language: str
    title: str | None
    text: str


_FENCE = re.compile(
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


def read_page(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """All of a page, in order; a fence of any other form than ours is an error."""
    content = read_page(page)
    found = list(_FENCE.finditer(content))
    assert content.count("```") == 2 * len(found), f"{page}: a fence is indented, or has options besides a title"
    return [
        Block(page, content[: match.start()].count("\n") + 1, match["language"], match["title"], match["text"])
        for match in found
    ]


class Reader:
    """Does what a page says, in the current folder, in one process but for services."""

    def __init__(self, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys = capsys
        self._monkeypatch = monkeypatch
        self._names: dict[str, object] = {}
        self._services: list[Service] = []

    def follow(self, block: Block) -> None:
        text = block.text
        for ours, smaller in SMALLER.items() if block.page not in NOT_FOLLOWED else ():
            text = text.replace(ours, smaller)
        if block.title:
            Path(block.title).write_text(text, encoding="utf-8")
        if block.language == "sh":
            self._shell(text, only_check=block.page in NOT_FOLLOWED)
        elif block.language == "python":
            self._python(text)
        elif block.language == "json":
            Vocabulary.parse(json.loads(text))
        else:  # a configuration is checked by the command that reads it; text is for reading
            assert block.language in ("yaml", "text"), f"{block.page}:{block.line}: what is {block.language!r}?"

    def close(self) -> None:
        for service in self._services:
            service.stop()

    def _python(self, text: str) -> None:
        used = [name for name in HEAVY if re.search(rf"\b{name}\b", text)]
        if any(importlib.util.find_spec(name) is None for name in used):
            compile(text, "page", "exec")
            return
        exec(compile(text, "page", "exec"), self._names)
        self._capsys.readouterr()

    def _shell(self, text: str, *, only_check: bool) -> None:
        if "curl " in text:
            self._bash(text)
            return
        for line in text.replace("\\\n", "").splitlines():
            words = shlex.split(line, comments=True)
            if words and (only_check or any(re.fullmatch(pattern, line.strip()) for pattern in NOT_RUN)):
                check(words, self._monkeypatch)
            elif words[:2] in (["opensan", "serve"], ["opensan", "ui"]):
                self._services.append(Service(words[1:]))
            elif words[:1] == ["opensan"]:
                self._opensan(words[1:])
            elif words[:1] == ["cat"] and words[2:4] == ["|", "opensan"]:
                content = io.BytesIO(Path(words[1]).read_bytes())
                self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content))
                self._opensan(words[4:])
            elif words[:1] == ["schemathesis"]:
                self._bash(line)
            else:
                assert not words, f"nothing is known of {line!r}: run it, or list it in NOT_RUN"

    def _opensan(self, arguments: list[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        output = self._capsys.readouterr()
        if arguments[:2] == ["data", "check"] and " images are missing" in output.err:  # a little of a benchmark
            return
        assert not caught.value.code, (arguments, output.err)

    def _bash(self, text: str) -> None:
        """With our programs, against the service that runs."""
        text = re.sub(r"(?<=localhost):\d+", f":{self._services[-1].port}", text)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text], capture_output=True, text=True, env={**os.environ, "PATH": path}
        )
        assert done.returncode == 0, (text, done.stdout[-3000:], done.stderr)


class Service:
    """`opensan serve` or `opensan ui`, at a free port."""

    def __init__(self, arguments: list[str]) -> None:
        check_opensan(arguments)
        quiet = ["--no-open"] if arguments[0] == "ui" else []
        environment = {**os.environ, "PYTHONPATH": str(Path(opensan.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "opensan", *arguments, *quiet, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        said = self._process.stdout.readline()
        assert "http://127.0.0.1:" in said, said + self._process.stdout.read()
        self.port = said.rpartition(":")[2].strip()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(60)
        said = self._process.stdout.read()
        self._process.stdout.close()
        assert code == 0, (code, said)


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be said of a command without running it."""
    match words:
        case ["pip", "install", *packages]:
            check_extras(packages)
        case ["opensan", "--install-completion" as option]:
            assert option in options_of(typer.main.get_command(app))
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), target
        case ["torchrun", "--nproc-per-node", _, "-m", "opensan", *arguments] | ["opensan", *arguments]:
            check_opensan(arguments)
        case ["python", "-c", code]:
            imports = [node for node in ast.parse(code).body if isinstance(node, ast.Import | ast.ImportFrom)]
            exec(compile(ast.Module(imports, []), "page", "exec"), {})
        case ["python", *script]:
            check_script(script, monkeypatch)
        case ["pytest", *arguments]:
            assert all((ROOT / one.partition("::")[0]).exists() for one in arguments if not one.startswith("-")), words
        case ["docker", *_]:
            assert (ROOT / "Dockerfile").exists() and (ROOT / "compose.yaml").exists()
        case _:
            raise AssertionError(f"no check is known for {words}")


def check_extras(packages: list[str]) -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {extra for package in packages for extra in re.findall(r"[\w-]+", "".join(re.findall(r"\[.*\]", package)))}
    assert named <= extras.keys(), packages


def check_opensan(arguments: list[str]) -> None:
    """The command exists and takes these options; a training's settings exist too."""
    command, rest = find_command(arguments)
    command.make_context(command.name, list(rest))
    if command.name == "train":
        from opensan.recipe.config import read_recipe

        config, *overrides = [word for word in rest if not word.startswith("-")]
        read_recipe(config, overrides)


def find_command(arguments: list[str]) -> tuple[Any, list[str]]:
    """The command that these words name, and the words after it. Raises KeyError if there is none."""
    command, rest = typer.main.get_command(app), list(arguments)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        command = command.commands[rest.pop(0)]
    return command, rest


def commands() -> list[Any]:
    """`opensan`, all its commands, and theirs."""
    found = [typer.main.get_command(app)]
    for command in found:
        found += getattr(command, "commands", {}).values()
    return found


def options_of(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


class _Parsed(Exception):
    """A script has understood its command line."""


def check_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a script with these options, up to where it has parsed them."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, args=None, namespace=None):
        parse(parser, args, namespace)
        raise _Parsed

    with monkeypatch.context() as patch, pytest.raises(_Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        if words[0] == "-m":
            patch.setattr(sys, "argv", words[1:])
            runpy.run_module(words[1], run_name="__main__")
        else:
            patch.setattr(sys, "argv", words)
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
