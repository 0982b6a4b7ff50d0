"""A few rounds of bench/fuzz_data.py: damaged sets end in a folder or in one line."""

import random

import pytest

import fuzz_data
from opensan.data.prepare import READERS
from opensan.data.prepare.engine import prepare
from opensan.errors import UserError


@pytest.mark.parametrize("name", fuzz_data.FORMS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_sets_end_in_a_folder_or_in_one_line(tmp_path, name):
    if name == "huggingface":
        pytest.importorskip("pyarrow")
    rng = random.Random(name)
    for number in range(25):
        raw = tmp_path / f"raw{number}"
        fuzz_data.FORMS[name](raw)
        fuzz_data.damage(raw, rng)
        try:
            prepare(READERS[name].open(raw), name, tmp_path / f"out{number}")
        except UserError as error:
            assert "\n" not in str(error)
