"""`make` installs what a command needs, and no more."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def steps(target, venv):
    """Return the commands that `make` would run in a fresh environment."""
    command = ["make", "--dry-run", target, f"VENV={venv}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_demo_installs_no_test_tools(tmp_path):
    demo, test = steps("demo", tmp_path / "venv"), steps("test", tmp_path / "venv")
    assert '-e "."' in demo and "[dev]" not in demo and "opensan demo" in demo
    assert '-e ".[dev]"' in test and "pytest" in test
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / ".ready-for-demo").touch()
    assert "pip install" not in steps("demo", tmp_path / "venv")
    assert '-e ".[dev]"' in steps("test", tmp_path / "venv")
