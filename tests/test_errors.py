"""Only a UserError is the user's: told in one line. Any other exception is a fault of the package, with a traceback."""

import errno
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from opensan.cli import main
from opensan.errors import HubError, UserError, install
from opensan.evaluation.evaluation import evaluate
from opensan.train.stream import MOST_REPLACEMENTS, _Positions
from opensan.vocabulary import Vocabulary


def failing(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        ValueError("operands could not be broadcast together with shapes (3,) (4,)"),
        KeyError("sizes"),
        TypeError("'NoneType' object is not subscriptable"),
        RuntimeError("The size of tensor a (3) must match"),
        AssertionError(),
        ConnectionError("no such thing is expected here"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "opensan/assets/classes/gone.json"),
        OSError("without a number"),
        IsADirectoryError(errno.EISDIR, "Is a directory", "x"),
    ],
)
def test_a_fault_of_ours_leaves_the_command_as_it_is(monkeypatch, capsys, error):
    monkeypatch.setattr(Vocabulary, "parse", failing(error))
    with pytest.raises(type(error)) as caught:
        main(["segment", "x.png", "--words", "road", "--model", "tiny"])
    assert caught.value is error
    assert "please report it" in caught.value.__notes__[0]
    assert capsys.readouterr().err == ""


def test_a_fault_of_ours_ends_with_a_traceback_and_whom_to_tell():
    code = (
        "from opensan.cli import main\nfrom opensan.vocabulary import Vocabulary\n"
        "Vocabulary.parse = lambda *_, **__: [].index(1)\n"
        "main(['segment', 'x.png', '--words', 'road', '--model', 'tiny'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and done.stderr.rstrip().endswith("report it with the lines above.")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("x.png: what was wrong;\nwhat would be right"), "x.png: what was wrong; what would be right"),
        (HubError("owner/name: the hub did not answer"), "owner/name: the hub did not answer"),
        (OSError(errno.ENOSPC, "No space left on device", "out/a.png"), "out/a.png: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "words.txt"), "words.txt: Permission denied"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
    ],
)
def test_what_a_user_can_mend_is_one_line(monkeypatch, run, error, line):
    monkeypatch.setattr(Vocabulary, "parse", failing(error))
    assert run("segment", "x.png", "--words", "road", "--model", "tiny") == (1, "", f"error: {line}\n")


def test_an_error_of_the_hub_is_all_that_it_was_before():
    assert issubclass(HubError, UserError) and issubclass(HubError, ConnectionError)
    assert str(HubError("a line")) == "a line"


class OneImage:
    """A data set whose only image raises `error` when it is read."""

    vocabulary = Vocabulary.parse("road")
    gives_labels = True

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        raise self.error

    def load(self, index: int, generator: np.random.Generator):
        raise self.error

    def name(self, index: int) -> str:
        return "image-1"


@pytest.mark.parametrize("error", [UserError("a.png: damaged"), OSError(errno.EIO, "Input/output error", "a.png")])
def test_an_image_that_cannot_be_read_is_left_out_of_an_evaluation(error):
    found = evaluate(lambda image: image, OneImage(error), progress=False)
    assert found.images == 0 and len(found.broken) == 1 and "a.png" in found.broken[0]


def test_a_fault_in_reading_is_no_broken_image():
    error = ValueError("operands could not be broadcast together")
    with pytest.raises(ValueError, match="broadcast") as caught:
        evaluate(lambda image: image, OneImage(error), progress=False)
    assert caught.value is error
    with pytest.raises(ValueError, match="broadcast"):
        _Positions([OneImage(error)], seed=0)[0, 0]


def test_images_that_cannot_be_read_are_replaced_in_a_training():
    found = _Positions([OneImage(UserError("a.png: damaged"))], seed=0)[0, 0]
    assert isinstance(found, UserError) and f"{MOST_REPLACEMENTS} broken samples in a row" in str(found)


def test_messages_about_missing_extras_name_what_works():
    root = Path(__file__).parents[1]
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    sources = {path: path.read_text(encoding="utf-8") for path in (root / "src").rglob("*.py")}
    assert not [path for path, text in sources.items() if "opensan[" in text]
    named = {extra for text in sources.values() for extra in re.findall(r"""install\(["'](\w+)["']\)""", text)}
    assert {"serve", "geo", "video", "encoders", "huggingface"} <= named <= extras.keys()
    assert install("geo").startswith("pip install '.[geo]'")
