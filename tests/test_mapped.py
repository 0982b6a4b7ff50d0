"""Weights of a file leave memory between their uses, and nothing that was changed in memory is lost."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import opensan
from opensan.checkpoints import save_folder
from opensan.model.mapped import forgetting
from opensan.segmenters.san import SanSegmenter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are forgotten on Linux alone")
WORDS = "road, sky, meadow"


@pytest.fixture
def weights(tmp_path):
    """A file of two tensors of four megabytes, as safetensors maps it, all of it read."""
    save_file({name: torch.full((1024, 1024), number) for name, number in (("a", 1.0), ("b", 2.0))}, tmp_path / "w")
    state = load_file(tmp_path / "w")
    assert [float(tensor.sum()) for tensor in state.values()] == [2.0**20, 2.0**21]
    return state


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def resident_kib(path: Path) -> int:
    """Memory that this process's mappings of a file take now."""
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    return sum(int(re.search(r"Rss: +(\d+)", text)[1]) for text in mappings if f"{path}\n" in text)


def test_read_weights_leave_memory_and_can_be_read_again(weights, tmp_path):
    assert resident_kib(tmp_path / "w") >= 8192
    forget = forgetting()
    for tensor in weights.values():
        forget(tensor)
    assert resident_kib(tmp_path / "w") <= 16  # the header, and pages that two tensors share
    assert [float(tensor.mean()) for tensor in weights.values()] == [1, 2]


def test_changed_weights_stay(weights):
    weights["a"][512, 0] = 7.0
    forget = forgetting()
    for tensor in weights.values():
        forget(tensor)
    assert weights["a"][512, 0] == 7


def test_weights_changed_in_a_loaded_model_stay(small_model, tmp_path, image):
    loaded = opensan.load(save_folder(small_model, tmp_path / "model"), text_cache=False)
    table = loaded.model.clip.token_table().data
    table.mul_(2)
    changed = table.clone()
    loaded.segment(image, WORDS)
    assert torch.equal(table, changed)


def test_tensors_of_no_file_stay():
    tensor = torch.full((1024, 1024), 3.0)
    forgetting()(tensor)
    assert (tensor == 3).all()


def test_a_loaded_model_answers_as_the_same_in_memory_and_its_file_is_mostly_out_of_it(small_model, tmp_path, image):
    folder = save_folder(small_model, tmp_path / "model")
    loaded = opensan.load(folder, text_cache=False)
    expected = SanSegmenter(small_model, text_cache=False)
    assert loaded.identity == expected.identity
    for _ in range(2):  # the second time, the text tower's pages are read again
        found = loaded.segment(image, WORDS)
        assert (found.confidence == expected.segment(image, WORDS).confidence).all()
        loaded.text._classifiers = type(loaded.text._classifiers)(1)
        loaded.text._rows = type(loaded.text._rows)(1)
