"""What Windows and macOS lack is not needed: everything imports and works without it."""

import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

WITHOUT = """if True:
    import builtins, importlib, multiprocessing, os, pkgutil, signal, sys, types
    import opensan

    def portable(module, missing, **changed):
        left = {name: value for name, value in vars(module).items() if name not in missing.split()}
        return types.SimpleNamespace(**left | changed)

    modules = dict.fromkeys(["resource", "fcntl", "termios", "pwd", "grp", "syslog"])
    modules["os"] = portable(
        os, "sched_getaffinity fork getuid geteuid getloadavg killpg setsid mkfifo statvfs sysconf pread", name="nt"
    )
    modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda *_: None)  # Windows has it
    modules["signal"] = portable(signal, "SIGKILL SIGHUP SIGALRM SIGUSR1 SIGCHLD pthread_sigmask setitimer")
    real = builtins.__import__

    def without(name, globals=None, *rest, **named):
        # Libraries know for themselves where they are.
        if name in modules and str((globals or {}).get("__name__")).startswith("opensan"):
            if modules[name] is None:
                raise ModuleNotFoundError(name, name=name)
            return modules[name]
        return real(name, globals, *rest, **named)

    builtins.__import__ = without
    multiprocessing.set_start_method("spawn")
"""

WORK = """
    for found in pkgutil.walk_packages(opensan.__path__, "opensan."):
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:  # an extra that is not installed
            assert error.name not in sys.stdlib_module_names, (found.name, error)
    from opensan.cli import main
    for line in sys.argv[1:]:
        try:
            main(line.split("|"))
        except SystemExit as end:
            assert not end.code, (line, end.code)
"""


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        labels = np.kron(generator.integers(0, 2, (4, 5)), np.ones((16, 16))).astype(np.uint8)
        Image.fromarray(labels * 255).convert("RGB").save(folder / "images" / f"{name}.png")
        Image.fromarray(labels).save(folder / "labels" / f"{name}.png")
    (folder / "classes.txt").write_text("sand\nsnow\n")
    for split in ("train", "val"):
        (folder / f"{split}.txt").write_text("a\nb\n")
    return folder


def test_all_imports_and_the_main_commands_work(tmp_path, data):
    recipe = {
        "start": {"model": "tiny", "weights": "model"},
        "data": [{"folder": str(data)}],
        "validation": {"folder": str(data)},
        "loop": {"steps": 1, "batch_size": 1, "validate_every": 1, "workers": 1},
        "augment": {"short_sides": [64], "crop": [64, 64]},
        "points": {"count": 16},
        "out": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    commands = [
        f"segment|{data}/images|--model|tiny|--words|sand, snow|--out|{tmp_path}/labels",
        f"eval|--data|{data}|--model|tiny|--out|{tmp_path}/figures",
        f"train|{tmp_path}/recipe.yaml",
    ]
    done = subprocess.run([sys.executable, "-c", WITHOUT + WORK, *commands], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for written in ("labels/a.labels.png", "figures/data/metrics.json", "run/model/model.safetensors"):
        assert (tmp_path / written).is_file(), done.stdout + done.stderr
