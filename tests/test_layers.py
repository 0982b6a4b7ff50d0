"""Every module imports only from those below it, and the light ones stay light."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LIGHT = ["opensan", "opensan.files", "opensan.vocabulary", "opensan.config", "opensan.outputs", "opensan.cli"]
"""What the command line needs before any work: torch alone takes seconds to import."""


def test_modules_import_only_from_those_below_them():
    linter = Path(sys.executable).with_name("lint-imports")
    if not linter.exists():
        pytest.skip("import-linter is not installed beside this Python")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_has_its_layer():
    """The contract says nothing about a module that it does not list."""
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[[tool.importlinter.contracts]]")[2]
    for entry in sorted((ROOT / "src" / "opensan").iterdir()):
        if (entry.suffix == ".py" and entry.stem != "__init__") or (entry / "__init__.py").exists():
            assert re.search(rf"\bopensan\.{entry.stem}\b", contract), entry.stem


def test_the_map_of_the_rooms_is_complete():
    """CONTRIBUTING names every room and every module of the package's root, and nothing that is not there."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page.partition("## Where things are")[2].partition("## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    named = [name.rstrip("/") for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    package = ROOT / "src" / "opensan"
    there = {entry.stem for entry in package.glob("*.py") if not entry.stem.startswith("__")}
    there |= {entry.parent.name for entry in package.glob("*/__init__.py")}
    assert sorted(named) == sorted(there)
    assert len(list(package.glob("*.py"))) <= 12, "the root holds plain things only: a subject has a room of its own"


@pytest.mark.parametrize("module", LIGHT)
def test_importing_a_light_module_leaves_torch_alone(module):
    if find_spec(module) is None:
        pytest.skip(f"there is no {module}")
    code = f"import sys, {module}; sys.exit(' '.join({{'torch', 'open_clip', 'timm'}} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_segmenting_imports_no_more_than_it_needs():
    """Each of these takes longer to import than a photograph to be labelled; torch reaches for some on its own."""
    heavy = {
        "torchvision",
        "open_clip",
        "timm",
        "transformers",
        "scipy",
        "sympy",
        "torch._dynamo",
        "matplotlib",
        "ftfy",
    }
    code = f"""if True:
        import sys, warnings
        import numpy as np
        import opensan
        warnings.simplefilter("ignore")
        opensan.load("tiny").segment(np.zeros((64, 64, 3), np.uint8), ["sand", "snow"])
        sys.exit(" ".join({heavy} & set(sys.modules)) or 0)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
