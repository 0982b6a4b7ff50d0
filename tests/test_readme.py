"""The README's first command and its lines of Python give what it shows; `tests/test_docs.py` follows all of it."""

import re
import subprocess
import sys
from pathlib import Path

import opensan

from .documentation import ROOT, blocks


def test_the_first_command_and_the_python_lines_work_offline(tmp_path):
    """As a newcomer runs them: in processes of their own, with no hub to reach."""
    (tmp_path / "src").symlink_to(ROOT / "src")
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(opensan.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    _, command, python = blocks("README.md")
    words = re.findall(r'"([^"]+)"', command.text)[0]
    lines = re.sub(r"^opensan ", f"{sys.executable} -m opensan ", command.text, flags=re.MULTILINE)
    done = subprocess.run(["bash", "-e", "-c", lines], cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert any(word.strip() in done.stdout for word in words.split(","))
    overlay = tmp_path / "out" / "playground.overlay.png"
    drawn = overlay.read_bytes()
    overlay.unlink()
    done = subprocess.run(
        [sys.executable, "-c", python.text], cwd=tmp_path, env=offline, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert overlay.read_bytes() == drawn
