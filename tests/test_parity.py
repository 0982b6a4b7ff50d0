"""The official code's recorded answers, and that the comparison would notice."""

import json
import shutil

import numpy as np
import pytest

from opensan.model import side_adapter
from opensan.parity.golden import golden_config, golden_model, read_golden
from opensan.parity.inference import check_inference

from .conftest import GOLDENS, SHARED

TINY = ("tiny_a.npz", "tiny_b.npz")


@pytest.mark.parametrize("name", TINY)
def test_tiny_goldens(name):
    rows = check_inference(GOLDENS / name)
    recorded = [key for key in np.load(GOLDENS / name).files if key.startswith("expect/")]
    assert len(rows) == len(recorded) + 1  # every recorded tensor, and the labels
    assert [row for row in rows if not row.passed] == []


def test_b16_golden():
    path = SHARED / "goldens" / "b16.npz"
    if not path.exists():
        pytest.skip("the B/16 golden lies outside of the repository and is not here")
    assert [row for row in check_inference(path) if not row.passed] == []


def test_a_wrong_epsilon_is_noticed(monkeypatch, run):
    monkeypatch.setattr(side_adapter, "SIDE_NORM_EPS", 1e-5)
    code, stdout, _ = run("parity", GOLDENS / "tiny_a.npz")
    assert code == 1 and "FAIL" in stdout  # which rows exceed their limit depends on the processor
    code, stdout, _ = run("parity", GOLDENS / "tiny_a.npz", "--json")
    (rows,) = json.loads(stdout).values()
    assert code == 1 and not all(row["passed"] for row in rows)


def test_a_wrong_activation_is_noticed(tmp_path):
    """A CLIP built without QuickGELU gives silently wrong numbers; here they are not silent."""
    with np.load(GOLDENS / "tiny_a.npz") as file:
        arrays = dict(file)
    meta = json.loads(str(arrays["meta"]))
    meta["config"]["clip"]["quick_gelu"] = False
    arrays["meta"] = np.array(json.dumps(meta))
    np.savez(tmp_path / "gelu.npz", **arrays)
    failed = {row.name for row in check_inference(tmp_path / "gelu.npz") if not row.passed}
    assert {"clip_features/4", "mask_embeddings", "text_classifier"} <= failed


def test_weights_differ_by_name():
    meta, _ = read_golden(GOLDENS / "tiny_a.npz")
    state = golden_model(golden_config(meta, "tiny_a")).state_dict()
    first, second = (state[f"clip.visual.transformer.resblocks.{i}.mlp.c_fc.weight"] for i in (3, 4))
    assert not np.allclose(first, second)


def test_unreadable_goldens_are_one_line(tmp_path):
    shutil.copy(GOLDENS / "tiny_a.npz", tmp_path / "cut.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:1000])
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("cut.npz", "text.npz", "absent.npz"):
        with pytest.raises(ValueError, match="not a golden file") as error:
            check_inference(tmp_path / name)
        assert "\n" not in str(error.value) and "pickle" not in str(error.value)
