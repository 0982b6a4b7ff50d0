"""`opensan adapt` killed with SIGKILL, at any instant and in the midst of each act, and called again."""

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opensan.checkpoints import load_model
from opensan.train.log import CsvLog, NoProgress
from opensan.tune import adapt as module
from opensan.tune.adapt import Adaptation, AdaptSettings, Checked, Score, adapt
from opensan.vocabulary import Vocabulary

from .test_trainer import dying, killed_at_any_instant, losses

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="needs fork")]

WORDS = Vocabulary.parse(["road", "car", "sky"])
QUICK = AdaptSettings(steps=9, batch=1, learning_rate=1e-3, score_every=3, patience=9, scored=1, keep=0)
MOVED = "side_adapter.query_embedding"

ACTS = {
    "a checkpoint of the teacher is half written": (Path, "write_bytes", "half", ".best-"),
    "a row of the log is missing": (CsvLog, "add", "before", ""),
    "before the weights have their name": (Path, "replace", "before", ".model."),
    "between the weights and the configuration": (Path, "replace", "before", ".config."),
    "before the record has its name": (Path, "replace", "before", ".adaptation."),
    "before the former model is removed": (Path, "unlink", "before", "config.json"),
    "in the midst of that": (Path, "unlink", "before", "model.safetensors"),
    "before its record is removed": (Path, "unlink", "before", "adaptation.json"),
    "after that": (Path, "unlink", "after", "adaptation.json"),
}
"""What an adaptation can be killed in the midst of, in the order in which it does them."""


def adaptation(model: Path, photos: Path, out: Path, checked: tuple[float, float] | None = None) -> Adaptation:
    """Adapt with an agreement that grows as the weights move; `checked`: the check set's figures, before and after."""
    torch.set_num_threads(1)  # sums are then taken in the same order
    start = load_model(model).get_parameter(MOVED)

    def score(segmenter, *_) -> Score:
        moved = (segmenter.model.get_parameter(MOVED) - start).norm().item()
        return Score(0.5 + 0.4 * float(np.tanh(moved)), np.array([50, 50, 0]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "score", score)
        if checked is not None:
            figures = dict(zip(("before", "after"), checked, strict=True))
            patch.setattr(module, "open_set", lambda path: path)
            patch.setattr(module, "_measure", lambda *given: Checked(*[figures[given[3].name]] * 3))
        check = None if checked is None else photos
        return adapt(photos, WORDS, model, out=out, check=check, settings=QUICK, progress=NoProgress())


def die_in(act: str, countdown: int, *given) -> None:
    """Adapt, in a process of its own, until it is killed."""
    kind, name, when, only = ACTS[act]
    setattr(kind, name, dying(getattr(kind, name), when, countdown, only))
    adaptation(*given)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        blocks = np.random.default_rng(number).integers(0, 255, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(16, 0).repeat(16, 1)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def context():
    """Processes in which torch is imported already, and that inherit no thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["opensan.tune.adapt", "tests.test_adapt_kills"])
    return context


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model_folder, photos) -> Path:
    """The folder of an adaptation that nothing disturbed."""
    threads, out = torch.get_num_threads(), tmp_path_factory.mktemp("whole") / "adapted"
    assert adaptation(model_folder, photos, out).folder == out / "model"
    torch.set_num_threads(threads)
    return out


def files(folder: Path) -> list[str]:
    """Return the files below a folder; of checkpoints the kind and step, as their states hold times."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(str(path.with_name(path.name[:13]) if path.suffix == ".pt" else path) for path in paths)


def same(out: Path, whole: Path) -> None:
    """Compare folders: the model to the byte, the log but for times, and that there is no other file."""
    for name in ("model.safetensors", "config.json", "adaptation.json"):
        assert (out / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()
    assert losses(out / "run") == losses(whole / "run")
    assert (out / "run/validation.csv").read_bytes() == (whole / "run/validation.csv").read_bytes()
    assert files(out) == files(whole)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "adapted"


def test_killed_at_any_instant_the_same_call_ends_with_the_same_model(out, model_folder, photos, whole, context):
    def newest() -> int:
        names = [path.name for path in out.glob("run/checkpoints/step-*")]
        return max((int(name.split("-")[1]) for name in names), default=0)

    def no_model_too_soon() -> None:
        assert not (out / "model/adaptation.json").exists() or newest() == QUICK.steps

    kills, seen = killed_at_any_instant(
        lambda: context.Process(target=adaptation, args=(model_folder, photos, out)),
        newest,
        most=4,
        leaps=(0, 1, 2),
        seconds=0.05,
        after=no_model_too_soon,
    )
    assert kills >= 3 and len(seen) > 1
    same(out, whole)


def test_killed_in_the_midst_of_every_act_nothing_is_left_half_written(out, model_folder, photos, whole, context):
    def kill(act: str, countdown: int, *checked: tuple[float, float]) -> None:
        process = context.Process(target=die_in, args=(act, countdown, model_folder, photos, out, *checked))
        process.start()
        process.join()
        assert process.exitcode == -9, act

    acts = list(ACTS)
    for act in acts[:5]:
        kill(act, 2 if act == acts[0] else 1)
        assert not (out / "model/adaptation.json").exists(), act
        assert act != acts[3] or not (out / "model/config.json").exists()  # no model yet, for any reader
    assert adaptation(model_folder, photos, out).folder == out / "model"
    same(out, whole)
    # The check set got worse: the model is written to `rejected`, and the former one removed.
    for act in acts[5:]:
        kill(act, 1, (0.5, 0.4))
        assert act == acts[5] or not (out / "model/config.json").exists(), act
    assert adaptation(model_folder, photos, out, (0.5, 0.4)).rejected
    assert not (out / "model").exists()
    for name in ("model.safetensors", "config.json"):
        assert (out / "rejected" / name).read_bytes() == (whole / "model" / name).read_bytes()
    assert json.loads((out / "rejected/adaptation.json").read_text())["rejected"] is True
    assert not [name for name in files(out) if ".part" in name]
