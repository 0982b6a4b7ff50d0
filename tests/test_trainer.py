"""The trainer: same numbers after any interruption, and no silent loss."""

import csv
import hashlib
import math
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from opensan.config import parse_config
from opensan.data.augment import AugmentConfig
from opensan.errors import UserError
from opensan.train.checkpoint import CheckpointFolder
from opensan.train.config import LoopConfig, PointsConfig, SanTrainingConfig
from opensan.train.log import CsvLog
from opensan.train.loop import RunResult, Trainer
from opensan.train.optimizer import ParameterGroup, poly_factor
from opensan.train.san import train_san
from opensan.train.stream import SampleOrder, stream
from opensan.vocabulary import Vocabulary


class Numbers:
    """A source of noisy points on a line; sample 13 is broken, whatever asks for it."""

    def __init__(self, count: int = 20, broken: int | None = None) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"number {index}"

    def load(self, index: int, generator: np.random.Generator) -> tuple[float, float, int]:
        if index == self.broken:
            raise UserError("cannot be read")
        return index / 10, index / 5 + generator.normal(), index

    def collate(self, samples: list) -> torch.Tensor:
        return torch.tensor(samples)


class Line(nn.Module):
    """Fits a line, with noise from torch's generator, so that any wrongly restored state shows in the losses."""

    def __init__(
        self, seconds: float = 0.0, bad: frozenset[int] = frozenset(), terminate_at: int | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.1, -0.3]))
        self.seconds, self.bad, self.terminate_at, self.calls = seconds, bad, terminate_at, 0

    def prepare(self, batches: list[torch.Tensor]) -> float:
        self.calls += 1
        if self.calls == self.terminate_at:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(self.seconds)
        return float(sum(len(batch) for batch in batches))

    def forward(self, batch: torch.Tensor, total: float) -> dict[str, torch.Tensor]:
        x, y, index = batch.unbind(1)
        error = self.weight[0] * x + self.weight[1] + 0.1 * torch.randn(len(x)) - y
        if self.bad & set(index.int().tolist()):
            error = error * float("nan")
        return {"loss_square": (error**2).sum() / total, "loss_size": 0.01 * self.weight.norm()}


def trainer(out: Path, task: Line | None = None, source: Numbers | None = None, **settings) -> Trainer:
    task = task or Line()
    groups = [ParameterGroup(("weight",), (task.weight,), 0.05, 0.0)]
    config = LoopConfig(**{"steps": 40, "batch_size": 3, "save_every": 3, "log_every": 1, "clip_norm": 1.0, **settings})
    return Trainer(task, source or Numbers(), groups, config, out)


def losses(out: Path) -> list[list[str]]:
    """The log without the columns that measure time and memory."""
    with (out / "log.csv").open(newline="") as file:
        return [row[:7] for row in csv.reader(file)]


def killed_at_any_instant(
    process: Callable[[], BaseProcess],
    newest: Callable[[], int],
    *,
    most: int,
    leaps: tuple[int, ...],
    seconds: float,
    after: Callable[[], None] = lambda: None,
) -> tuple[int, set[int]]:
    """Kill the first `most` processes, until one ends well; return how many were killed, and at which newest steps.

    `process` makes one, `newest` tells the step of the newest checkpoint. Each gets some of `leaps` steps further than
    the one before, however slow the machine is, and is killed at an instant within `seconds` from then. `after` is
    called after each kill.
    """
    chance, kills, seen = random.Random(0), 0, set()
    while True:
        begun = process()
        goal = newest() + chance.choice(leaps)
        begun.start()
        if kills < most:
            while newest() < goal and begun.is_alive():
                time.sleep(0.001)
            begun.join(chance.uniform(0, seconds))
        else:
            begun.join()
        if begun.exitcode is not None:
            assert begun.exitcode == 0
            return kills, seen
        begun.kill()
        begun.join()
        after()
        kills += 1
        seen.add(newest())


def test_kill_at_any_instant_changes_no_later_number(tmp_path):
    steps = 240
    whole = trainer(tmp_path / "whole", steps=steps)
    assert whole.run().finished

    def train() -> None:
        trainer(tmp_path / "killed", Line(seconds=0.002), steps=steps).run()

    def newest() -> int:
        names = [path.name for path in (tmp_path / "killed").glob("checkpoints/step-*")]
        return max((int(name.split("-")[1]) for name in names), default=0)

    context = multiprocessing.get_context("fork")
    kills, seen = killed_at_any_instant(
        lambda: context.Process(target=train), newest, most=12, leaps=(0, 3, 3, 6), seconds=0.02
    )
    assert kills >= 10 and len(seen) > 5  # some kills came early, some in the middle
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    resumed = trainer(tmp_path / "killed", steps=steps)
    assert resumed.run().step == steps
    assert torch.equal(resumed.task.weight, whole.task.weight)
    assert len(list((tmp_path / "killed" / "checkpoints").iterdir())) == 2


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying(original, when: str, countdown: int, only: str = ""):
    """`original`, but at its `countdown`-th call (on a path whose name has `only` in it) the process is killed."""
    left = countdown

    def call(self, *args, **settings):
        nonlocal left
        left -= only in getattr(self, "name", only)
        if left == 0 and when == "half":
            original(self, args[0][: len(args[0]) // 2])
        if left == 0 and when != "after":
            die()
        result = original(self, *args, **settings)
        if left == 0:
            die()
        return result

    return call


ACTS = {
    "the forward pass": (Line, "forward", "before", ""),
    "the update": (torch.optim.AdamW, "step", "before", ""),
    "after the update": (torch.optim.AdamW, "step", "after", ""),
    "a checkpoint is half written": (Path, "write_bytes", "half", ".step-"),
    "before a checkpoint has its name": (Path, "replace", "before", ".step-"),
    "after a checkpoint has its name": (Path, "replace", "after", ".step-"),
    "before an older checkpoint is removed": (Path, "unlink", "before", "step-"),
    "after an older checkpoint is removed": (Path, "unlink", "after", "step-"),
    "the best checkpoint is half written": (Path, "write_bytes", "half", ".best-"),
    "before the older best one is removed": (Path, "unlink", "before", "best-"),
    "a row of the log is missing": (CsvLog, "add", "before", ""),
    "the log is ahead of the checkpoints": (CsvLog, "add", "after", ""),
    "the configuration is half written": (Path, "write_text", "half", ".config"),
    "the log's later rows are being dropped": (Path, "write_text", "half", ".log"),
}
"""What a run can be killed in the midst of."""


def scored(out: Path) -> Trainer:
    run = trainer(out, steps=120, validate_every=5, save_every=4, keep=2)
    run.validate, run.best_by = lambda step: {"score": run.task.weight[0].item()}, "score"
    return run


def test_kill_in_the_midst_of_every_act_changes_no_later_number(tmp_path):
    whole = scored(tmp_path / "whole")
    assert whole.run().finished
    chance = random.Random(1)

    def train(kind: type, name: str, when: str, only: str, countdown: int) -> None:
        setattr(kind, name, dying(getattr(kind, name), when, countdown, only))
        scored(tmp_path / "killed").run()

    for act, (kind, name, when, only) in ACTS.items():
        # At the start there are no later rows to drop, and the configuration is written once.
        countdown = 1 if name == "write_text" else chance.randint(1, 3)
        process = multiprocessing.get_context("fork").Process(target=train, args=(kind, name, when, only, countdown))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, act
    last = scored(tmp_path / "killed")
    assert last.run() == RunResult(120, True, whole.best, 0)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for name in ("config.json", "validation.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert torch.equal(last.task.weight, whole.task.weight)
    kept = sorted(path.name[:13] for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert kept == ["best-00000120", "step-00000116", "step-00000120"]


def test_sigterm_saves_and_leaves_and_the_same_call_goes_on(tmp_path):
    trainer(tmp_path / "whole").run()
    result = trainer(tmp_path / "stopped", Line(terminate_at=8)).run()
    assert (result.step, result.finished) == (8, False)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert trainer(tmp_path / "stopped").run().finished
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(tmp_path, capsys):
    trainer(tmp_path / "whole").run()
    trainer(tmp_path / "run", Line(terminate_at=20)).run()
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*.pt"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert trainer(tmp_path / "run").run().finished
    said = capsys.readouterr().err
    assert f"{newest.name}: damaged" in said and "continuing" in said and "after step 18" in said
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_checkpoints_execute_nothing(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    folder.save({"step": Malicious()}, 1)
    with pytest.raises(Exception, match=r"Weights only load failed"):
        folder.load_newest()
    assert not (tmp_path / "executed").exists()


def test_non_finite_steps_are_named_and_skipped_and_three_in_a_row_stop(tmp_path, capsys):
    run = trainer(tmp_path / "one", Line(bad=frozenset({13})), steps=14, batch_size=2, save_every=100)
    assert run.run().finished
    said = capsys.readouterr().err
    order = SampleOrder(20, seed=0)
    bad_steps = [step for step in range(14) if 13 in (order(2 * step), order(2 * step + 1))]
    assert 1 <= len(bad_steps) <= 2
    for step in bad_steps:
        assert f"step {step} skipped" in said and "number 13" in said
    assert torch.isfinite(run.task.weight).all()

    run = trainer(tmp_path / "all", Line(bad=frozenset(range(20))), steps=14, save_every=100)
    with pytest.raises(RuntimeError, match="3 steps in a row had no finite losses"):
        run.run()
    assert torch.equal(run.task.weight.detach(), Line().weight.detach())
    assert [path.name[:13] for path in (tmp_path / "all" / "checkpoints").iterdir()] == ["step-00000003"]

    with pytest.raises(RuntimeError, match="in a row had no finite losses"):  # continued, it fares no better
        trainer(tmp_path / "all", Line(bad=frozenset(range(20))), steps=14, save_every=100).run()
    trainer(tmp_path / "all", Line(), steps=14, save_every=100).run()


def test_a_broken_sample_is_named_and_replaced(tmp_path, capsys):
    assert trainer(tmp_path, source=Numbers(broken=13), steps=20).run().finished
    assert capsys.readouterr().err.count("skipped a broken sample: number 13: cannot be read") >= 2


class AllBroken(Numbers):
    """No sample can be read."""

    def load(self, index: int, generator: np.random.Generator) -> tuple[float, float, int]:
        raise UserError("cannot be read")


def test_no_worker_outlives_a_run_that_fails(tmp_path):
    """Even while somebody holds the error: at its end the interpreter would wait for them, and they ignore signals."""
    with pytest.raises(ValueError, match=r"^10 broken samples in a row, .*cannot be read$") as one:
        trainer(tmp_path / "broken", source=AllBroken(), workers=2).run()
    assert not multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="3 steps in a row had no finite losses") as two:
        trainer(tmp_path / "nan", Line(bad=frozenset(range(20))), workers=2).run()
    assert not multiprocessing.active_children(), (one, two)


def test_a_run_of_another_configuration_is_not_continued(tmp_path):
    trainer(tmp_path, steps=4).run()
    with pytest.raises(ValueError, match=r"holds a run with loop.batch_size = 3, not 4"):
        trainer(tmp_path, steps=4, batch_size=4).run()
    assert trainer(tmp_path, steps=4, keep=7).run().finished  # changes no number


def test_one_process_at_a_time(tmp_path):
    class Inside(Line):
        def prepare(self, batches):
            with pytest.raises(ValueError, match="another process is training into this folder"):
                trainer(tmp_path).run()
            return super().prepare(batches)

    assert trainer(tmp_path, Inside(), steps=1).run().finished


def test_the_best_checkpoint_is_kept(tmp_path):
    run = trainer(tmp_path, steps=12, save_every=4, validate_every=2, keep=1)
    run.validate, run.best_by = lambda step: {"score": -abs(step - 6.0)}, "score"
    assert run.run().best == 0
    kept = sorted(path.name[:13] for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["best-00000006", "step-00000012"]
    assert (tmp_path / "validation.csv").read_text().splitlines()[:2] == ["step,score", "2,-4.0"]


def test_a_score_is_better_than_none(tmp_path):
    """A validation that could count nothing (its folder was out of reach) answers nan, which nothing is larger than."""
    run = trainer(tmp_path, steps=6, validate_every=2)
    run.validate, run.best_by = lambda step: {"score": {2: math.nan, 4: 0.3, 6: math.nan}[step]}, "score"
    assert run.run().best == 0.3
    assert [path.name[:13] for path in (tmp_path / "checkpoints").glob("best-*")] == ["best-00000004"]


def test_the_best_checkpoint_is_kept_by_its_score(tmp_path):
    """Also where a run was killed between the best one and the checkpoint that knows of it, and scores differ a bit."""

    def scoring(scores: dict[int, float], steps: int) -> Trainer:
        run = trainer(tmp_path, steps=12, save_every=4, validate_every=2, keep=2)
        run.validate, run.best_by = lambda step: {"score": scores[step]}, "score"
        if steps < 12:
            run.task.terminate_at = steps
        return run

    scoring({2: 0.1, 4: 0.3, 6: 0.9, 8: 0.2}, 7).run()  # stopped after step 7, whose checkpoint says 0.9
    folder = tmp_path / "checkpoints"
    for path in folder.glob("step-00000007-*"):
        path.unlink()  # as if it had been killed: the newest is that of step 4, which says 0.3
    found = scoring({6: 0.8, 8: 0.7, 10: 0.2, 12: 0.85}, 12).run()
    assert found.best == 0.9
    assert [path.name[:13] for path in folder.glob("best-*")] == ["best-00000006"]
    assert CheckpointFolder(folder, 2).load_best()["best"] == 0.9


def test_of_two_best_checkpoints_the_better_one_is_loaded(tmp_path):
    """A run that was killed between writing one and removing the other leaves both; names say nothing of scores."""
    folder = CheckpointFolder(tmp_path, 2)
    for score, step in ((0.9, 4), (0.4, 8), (math.nan, 9), (None, 10)):
        path = folder.save({"best": score, "step": step}, step, kind="best")
        path.rename(tmp_path / f"kept-{step}")
    for step in (4, 8, 9, 10):
        content = (tmp_path / f"kept-{step}").read_bytes()
        (tmp_path / f"best-{step:08d}-{hashlib.sha256(content).hexdigest()[:16]}.pt").write_bytes(content)
    assert folder.load_best()["step"] == 4
    folder.save({"best": 0.95, "step": 2}, 2, kind="best")
    assert [path.name[:13] for path in tmp_path.glob("best-*")] == ["best-00000002"]


def test_what_a_killed_training_left_half_written_is_removed(tmp_path):
    left = [".config.abcd0123.part.json", ".opensan.abcd0123.part", "checkpoints/.step-1.abcd0123.part.pt"]
    left += ["validation/.step-1.abcd0123.part.png", "model/.model.abcd0123.part.safetensors"]
    for name in (*left, "mine/notes.part.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    trainer(tmp_path, steps=2).run()
    assert [path.name for path in tmp_path.rglob("*.part*")] == ["notes.part.txt"]
    assert not (tmp_path / ".lock").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_names_the_log(tmp_path):
    log = CsvLog(tmp_path / "log.csv", 0)
    (tmp_path / "log.csv").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        log.add(1, {"loss": 1.0})
    assert caught.value.filename == str(tmp_path / "log.csv")


class Notes:
    """A logger that remembers what it was told."""

    def __init__(self) -> None:
        self.told = []

    def start(self, step: int) -> None:
        self.told.append(("start", step))

    def log(self, step: int, figures: dict) -> None:
        self.told.append(("log", step, "loss" in figures, figures.get("validation/score")))

    def pictures(self, step: int, pictures: dict) -> None:
        self.told.append(("pictures", step, list(pictures)))

    def close(self) -> None:
        self.told.append(("close",))


def test_loggers_are_told_figures_pictures_and_the_end(tmp_path):
    run, notes = trainer(tmp_path, steps=4, validate_every=3, log_every=2), Notes()
    run.validate, run.panel = lambda step: {"score": step / 2}, lambda step: {"panel": Image.new("RGB", (2, 2))}
    run.loggers = (notes,)
    run.run()
    assert notes.told == [
        ("start", 0),
        ("log", 2, True, None),
        ("log", 3, False, 1.5),
        ("pictures", 3, ["panel"]),
        ("log", 4, True, None),
        ("log", 4, False, 2.0),
        ("pictures", 4, ["panel"]),
        ("close",),
    ]


def test_micro_batches_see_what_ranks_would(tmp_path):
    def names(**shape) -> list[tuple[str, ...]]:
        settings = {"seed": 5, "first_step": 1, "steps": 3, "batch_size": 2, **shape}
        return [[one.names for one in step] for step in stream(Numbers(), **settings)]

    accumulated = names(accumulate=2)
    ranks = [names(rank=rank, world=2) for rank in range(2)]
    assert accumulated == [[first[0], second[0]] for first, second in zip(*ranks, strict=True)]


def test_every_epoch_has_every_sample_once_in_its_own_order():
    order = SampleOrder(7, seed=3)
    epochs = [[order(7 * epoch + place) for place in range(7)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert epochs[2] == [SampleOrder(7, seed=3)(14 + place) for place in range(7)]


def test_workers_change_nothing(tmp_path):
    trainer(tmp_path / "none", steps=8).run()
    trainer(tmp_path / "one", steps=8, workers=1).run()
    assert losses(tmp_path / "none") == losses(tmp_path / "one")


def test_schedule():
    assert [poly_factor(step, 100) for step in (0, 50, 99)] == pytest.approx([1, 0.5**0.9, 0.01**0.9])
    assert [poly_factor(step, 100, warmup=4) for step in range(2)] == pytest.approx([0.25, 0.5 * 0.99**0.9])


def test_unknown_settings_are_errors():
    with pytest.raises(ValueError, match=r"run.yaml: loop.stepz: no such key \(the nearest is loop.steps\)"):
        parse_config(SanTrainingConfig, {"loop": {"stepz": 3}}, "run.yaml")
    with pytest.raises(ValueError, match=r"loss_weights.clas"):
        parse_config(SanTrainingConfig, {"loss_weights": {"clas": 3}}, "run.yaml")


class Halves:
    """Photographs of a bright half on a dark ground, which half is chance."""

    vocabulary = Vocabulary.parse(["night", "day"])

    def __len__(self) -> int:
        return 12

    def name(self, index: int) -> str:
        return f"half {index}"

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.zeros((96, 96), np.int16)
        labels[(slice(None, 48), slice(48, None))[index % 2]] = 1
        return np.repeat((40 + 170 * labels[..., None]).astype(np.uint8), 3, axis=2), labels


def test_training_a_san_learns_masks_and_leaves_clip_alone(tmp_path, fresh_model):
    model = fresh_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = SanTrainingConfig(
        loop=LoopConfig(steps=30, batch_size=4, learning_rate=2e-3, log_every=1, save_every=10, clip_norm=1.0),
        augment=AugmentConfig(short_sides=(96,), crop=(96, 96), colour_jitter=False),
        points=PointsConfig(count=256),
    )
    assert train_san(model, Halves(), config, tmp_path / "run").finished
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    frozen = {n for n in before if n.startswith("clip.") and n != "clip.visual.positional_embedding"}
    assert changed and not changed & frozen
    assert not model.training
    with (tmp_path / "run" / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    masks = [float(row["loss_mask"]) + float(row["loss_dice"]) for row in rows]
    assert np.mean(masks[-5:]) < 0.7 * np.mean(masks[:5])

    # The same in two parts: the first one ends where a checkpoint was.
    halves = fresh_model()
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*20-*.pt"))
    part = tmp_path / "part"
    (part / "checkpoints").mkdir(parents=True)
    (part / "checkpoints" / newest.name).write_bytes(newest.read_bytes())
    assert train_san(halves, Halves(), config, part).finished
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in halves.state_dict().items())


def test_a_frozen_model_is_refused(tmp_path, fresh_model):
    with pytest.raises(ValueError, match="every parameter of the model is frozen"):
        train_san(fresh_model().requires_grad_(False), Halves(), SanTrainingConfig(), tmp_path)


def test_a_crop_that_does_not_suit_the_model_is_refused(tmp_path, fresh_model):
    config = SanTrainingConfig(augment=AugmentConfig(crop=(100, 96)))
    with pytest.raises(ValueError, match=r"augment.crop \(100, 96\): both sides must be multiples of 32"):
        train_san(fresh_model(), Halves(), config, tmp_path)
