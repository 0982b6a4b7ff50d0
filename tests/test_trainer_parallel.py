"""Several processes, mixed data sets, number formats, memory: none of them changes what is learned."""

import csv
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from opensan.data.augment import AugmentConfig
from opensan.distributed import process_group, rank
from opensan.structures import TextClassifier
from opensan.train.config import LoopConfig, PointsConfig, SanTrainingConfig
from opensan.train.criterion import SetCriterion
from opensan.train.loop import Trainer
from opensan.train.optimizer import ParameterGroup
from opensan.train.parallel import activations_checkpointed
from opensan.train.points import RandomPoints
from opensan.train.precision import LossScale, autocast_dtype
from opensan.train.san import SanTask, SegmentationSource, train_san
from opensan.train.stream import MIXTURE_ROUND, DatasetMixture, MixtureOrder, stream
from opensan.vocabulary import Vocabulary
from tests.ranks import run_ranks, start_ranks
from tests.test_trainer import Halves, Line, Numbers, losses, trainer


class Stripes(Halves):
    """Another data set, with words of its own and more of them."""

    vocabulary = Vocabulary.parse(["black", "grey", "white"])

    def name(self, index: int) -> str:
        return f"stripe {index}"

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(96) // 32, 96).reshape(96, 96).astype(np.int16)
        if index % 2:
            labels = labels.T.copy()
        return np.repeat((20 + 100 * labels[..., None]).astype(np.uint8), 3, axis=2), labels


def san_config(**loop) -> SanTrainingConfig:
    settings = {"steps": 3, "batch_size": 2, "learning_rate": 2e-3, "log_every": 1, "save_every": 100, **loop}
    return SanTrainingConfig(
        loop=LoopConfig(**settings),
        augment=AugmentConfig(short_sides=(96, 120), crop=(96, 96)),
        points=PointsConfig(count=64),
    )


def rows(out: Path) -> dict[str, list[float]]:
    """The columns of the log, without those that measure time and memory."""
    with (out / "log.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    timed = {"samples_per_second", "waiting_for_data", "peak_memory_mib"}
    return {name: [float(row[name]) for row in table] for name in table[0] if name not in timed}


def assert_same_training(out: Path, reference: Path, weights: dict, expected: dict, relative: float) -> None:
    ours, theirs = rows(out), rows(reference)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=relative, abs=1e-9), name
    for name, value in expected.items():
        difference = (weights[name] - value).abs().max().item()
        assert difference <= relative * max(1.0, value.abs().max().item()), (name, difference)


@pytest.mark.parametrize(("parallel", "checkpointing"), [("ddp", False), ("ddp", True), ("fsdp", True)])
def test_two_processes_make_the_updates_of_one_that_accumulates_two(tmp_path, fresh_model, parallel, checkpointing):
    data = [(Halves(), 1.0), (Stripes(), 1.0)]
    alone = fresh_model()
    assert train_san(alone, data, san_config(accumulate=2), tmp_path / "alone").finished

    def work() -> None:
        seen = []

        def validate(step: int) -> dict[str, float]:
            seen.append(step)
            return {"norm": model.no_object_embedding.norm().item()}

        config = san_config(parallel=parallel, activation_checkpointing=checkpointing, validate_every=2)
        model = fresh_model()
        result = train_san(model, data, config, tmp_path / "two", validate=validate, best_by="norm")
        assert result.finished and seen == [2, 3]
        torch.save(model.state_dict(), tmp_path / f"weights-{os.environ['RANK']}.pt")

    run_ranks(work)
    weights = [torch.load(tmp_path / f"weights-{number}.pt") for number in range(2)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert_same_training(tmp_path / "two", tmp_path / "alone", weights[0], alone.state_dict(), 1e-6)


def test_a_run_of_two_processes_goes_on_in_one_that_accumulates(tmp_path, fresh_model):
    alone = fresh_model()
    config = san_config(accumulate=2, steps=4)
    train_san(alone, Halves(), config, tmp_path / "alone")

    class Stopping(Halves):
        """Its third epoch begins with a signal to the second process only."""

        reads = 0

        def __getitem__(self, index: int):
            self.reads += 1
            if rank() == 1 and self.reads == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(index)

    def work() -> None:
        result = train_san(fresh_model(), Stopping(), san_config(parallel="fsdp", steps=4), tmp_path / "two")
        assert (result.step, result.finished) == (2, False)

    run_ranks(work)
    model = fresh_model()
    with pytest.raises(ValueError, match=r"holds a run with micro_batches_a_step = 2, not 1"):
        train_san(model, Halves(), san_config(steps=4), tmp_path / "two")
    assert train_san(model, Halves(), config, tmp_path / "two").finished
    assert_same_training(tmp_path / "two", tmp_path / "alone", model.state_dict(), alone.state_dict(), 1e-6)


def in_ranks(out: Path, **settings) -> None:
    """Train the line in this process of several."""
    with process_group("cpu"):
        trainer(out, **settings).run()


def test_two_processes_killed_at_any_instant_lose_nothing(tmp_path):
    settings = {"steps": 60, "log_every": 1, "save_every": 2}
    run_ranks(lambda: in_ranks(tmp_path / "whole", **settings))
    chance = np.random.default_rng(0)
    kills = 0
    while True:
        processes = start_ranks(lambda: in_ranks(tmp_path / "killed", task=Line(seconds=0.005), **settings))
        newest = newest_step(tmp_path / "killed")
        while kills < 3 and newest_step(tmp_path / "killed") < newest + 6 and processes[0].is_alive():
            time.sleep(0.001)
        if kills == 3:
            for process in processes:
                process.join()
        if processes[0].exitcode is not None:
            assert [process.exitcode for process in processes] == [0, 0]
            break
        time.sleep(chance.uniform(0, 0.02))
        os.kill(processes[kills % 2].pid, signal.SIGKILL)  # the other one must not go on alone
        for process in processes:
            process.join(10)
            assert process.exitcode not in (None, 0)
        kills += 1
    assert kills == 3
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def newest_step(out: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in out.glob("checkpoints/step-*")), default=0)


def test_a_bad_or_broken_sample_of_one_process_is_acted_on_by_all(tmp_path, capfd):
    def work() -> None:
        with process_group("cpu"):
            run = trainer(tmp_path, Line(bad=frozenset({13})), Numbers(broken=7), steps=10, batch_size=1)
            result = run.run()
            assert result.finished and result.broken == 1
            torch.save(run.task.weight, tmp_path / f"weight-{rank()}.pt")

    run_ranks(work)
    said = capfd.readouterr().err
    skipped = [line for line in said.splitlines() if "skipped: loss nan" in line]
    assert skipped and all(line.endswith("with number 13") for line in skipped)
    assert said.count("skipped a broken sample: number 7: cannot be read") == 1
    assert "1 broken samples were skipped" in said
    first, second = (torch.load(tmp_path / f"weight-{number}.pt") for number in range(2))
    assert torch.equal(first, second) and first.isfinite().all()
    counts = rows(tmp_path)["broken_samples"]
    assert counts[0] == 0 and counts[-1] == 1 and counts == sorted(counts)


def test_a_mixture_has_its_shares_and_its_order_follows_from_the_position():
    order = MixtureOrder(DatasetMixture((Numbers(), Numbers(), Numbers()), (0.7, 0.2, 0.1)), seed=4)
    drawn = [order(number) for number in range(2 * MIXTURE_ROUND)]
    sources = [source for source, _ in drawn]
    assert [sources.count(source) for source in range(3)] == [1_400, 400, 200]
    assert 0 < sources[:100].count(2) < 40 and sources[:50] != sources[MIXTURE_ROUND : MIXTURE_ROUND + 50]
    for source in range(3):  # every source's own micro-batches come one after the other, none left out
        assert [count for one, count in drawn if one == source] == list(range(sources.count(source)))
    fresh = MixtureOrder(DatasetMixture((Numbers(), Numbers(), Numbers()), (7, 2, 1)), seed=4)
    assert fresh(1_234) == drawn[1_234]


def test_a_micro_batch_is_of_one_source_and_goes_on_after_a_resume():
    class Named(Numbers):
        def __init__(self, title: str) -> None:
            super().__init__(11)
            self.title = title

        def name(self, index: int) -> str:
            return f"{self.title} {index}"

    def names(first: int, last: int) -> list[tuple[str, ...]]:
        mixture = DatasetMixture((Named("a"), Named("b")), (3, 1))
        batches = stream(mixture, seed=2, first_step=first, steps=last, batch_size=3, accumulate=2)
        return [one.names for step in batches for one in step]

    whole = names(0, 30)
    assert all(len({name[0] for name in batch}) == 1 for batch in whole)
    assert {batch[0][0] for batch in whole} == {"a", "b"}
    assert names(17, 30) == whole[34:]
    first_epoch = [name for batch in whole for name in batch if name[0] == "a"][:11]
    assert len(set(first_epoch)) == 11


@pytest.mark.parametrize(
    ("weights", "message"),
    [((1.0,), "have 1 weights"), ((1.0, 0.0), "above 0"), ((1.0, float("nan")), "above 0"), ((1e6, 1), "less than")],
)
def test_impossible_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        DatasetMixture((Numbers(), Numbers()), weights)


def test_precision_follows_the_device():
    assert autocast_dtype("auto", torch.device("cpu")) is None
    assert autocast_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    assert autocast_dtype("float16", torch.device("cpu")) is torch.float16
    assert autocast_dtype("float32", torch.device("cuda")) is None


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_short_number_formats_train_nearly_the_same(tmp_path, fresh_model, precision, monkeypatch):
    monkeypatch.setattr(LossScale, "START", 256.0)  # nothing overflows
    for kind in ("float32", precision):
        train_san(fresh_model(), Halves(), san_config(precision=kind), tmp_path / kind)
    exact, short = rows(tmp_path / "float32"), rows(tmp_path / precision)
    assert short["loss"] == pytest.approx(exact["loss"], rel=0.05) and short["loss"] != exact["loss"]
    assert short["gradient_norm"] == pytest.approx(exact["gradient_norm"], rel=0.1)
    assert short["gradient_scale"] == [256.0 if precision == "float16" else 1.0] * 3


class Steep(nn.Module):
    """Its gradient is finite, but not once it is multiplied with a large loss scale, as in float16."""

    LIMIT = 3e4

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))

    def prepare(self, batches: list) -> None: ...

    def forward(self, batch: torch.Tensor, _prepared: None) -> dict[str, torch.Tensor]:
        weight = self.weight * 1.0
        weight.register_hook(lambda gradient: torch.where(gradient.abs() > self.LIMIT, torch.inf, gradient))
        return {"loss_steep": 10 * weight.sum()}


def steep(out: Path, limit: float, steps: int = 10, precision: str = "float16") -> Trainer:
    task = Steep()
    task.LIMIT = limit
    config = LoopConfig(steps=steps, batch_size=1, log_every=1, save_every=2, precision=precision, clip_norm=None)
    return Trainer(task, Numbers(), [ParameterGroup(("weight",), (task.weight,), 0.1, 0.0)], config, out)


def test_overflowing_float16_gradients_lower_the_scale_and_do_not_stop_the_run(tmp_path, capsys):
    run = steep(tmp_path / "whole", limit=3e4)
    assert run.run().finished
    # 10 * 65536 must be halved until it is below the limit: 5 times.
    scales = rows(tmp_path / "whole")["gradient_scale"]
    assert scales == [65_536, 32_768, 16_384, 8_192, 4_096, *[2_048] * 5]
    assert capsys.readouterr().err.count("float16 gradients overflow") == 5
    assert run.task.weight.item() < 1
    # Stopped in the midst of it, the scale goes on where it was.
    part = steep(tmp_path / "part", limit=3e4)
    part.task.prepare = lambda batches: os.kill(os.getpid(), signal.SIGTERM) if part.step == 2 else None
    assert part.run().step == 3
    assert steep(tmp_path / "part", limit=3e4).run().finished
    assert rows(tmp_path / "part") == rows(tmp_path / "whole")


def test_a_run_goes_on_where_auto_means_another_number_format(tmp_path, monkeypatch):
    """From a GPU without bfloat16 to one that has it, and back."""

    def until(step: int, dtype: torch.dtype | None) -> None:
        monkeypatch.setattr("opensan.train.loop.autocast_dtype", lambda precision, device: dtype)
        run = steep(tmp_path, limit=1e6, precision="auto")
        run.task.prepare = lambda batches: os.kill(os.getpid(), signal.SIGTERM) if run.step == step - 1 else None
        assert run.run().step == step

    for step, dtype in ((2, torch.float16), (5, None), (10, torch.float16)):
        until(step, dtype)
    found = rows(tmp_path)
    assert found["gradient_scale"] == [65_536.0] * 2 + [1.0] * 3 + [65_536.0] * 5
    assert found["gradient_norm"] == [10.0] * 10


def test_gradients_that_overflow_at_every_scale_stop_the_run(tmp_path):
    with pytest.raises(RuntimeError, match=r"3 steps in a row had no finite losses.*gradient_norm inf"):
        steep(tmp_path, limit=1, steps=40).run()
    assert rows(tmp_path)["gradient_scale"][-1] == LossScale.FLOOR
    assert newest_step(tmp_path) == 19  # 16 halvings, then three in a row


def test_the_loss_scale_grows_after_many_good_steps():
    scale = LossScale(enabled=True)
    assert scale.shrink() and scale.value == 32_768
    for _ in range(LossScale.GROWTH_INTERVAL):
        scale.step_was_good()
    assert scale.value == 65_536
    assert not LossScale(enabled=False).shrink()


def test_checkpointed_activations_give_the_same_gradients_in_less_memory(tmp_path, fresh_model):
    weights = []
    for number, checkpointed in enumerate((False, True)):
        model = fresh_model()
        config = san_config(activation_checkpointing=checkpointed)
        train_san(model, Halves(), config, tmp_path / str(number))
        weights.append(model.state_dict())
    assert_same_training(tmp_path / "1", tmp_path / "0", weights[1], weights[0], 1e-6)

    text = TextClassifier(torch.zeros(2, 24), torch.arange(2), 2)
    task = SanTask(fresh_model().train(), [text], SetCriterion(RandomPoints(64)))
    source = SegmentationSource(Halves(), san_config().augment)
    batch = source.collate([source.load(index, np.random.default_rng(index)) for index in range(2)])

    def kept() -> int:
        """Bytes that the forward pass leaves for the backward pass."""
        sizes = []

        def count(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            task(batch, 1.0)
        return sum(sizes)

    torch.manual_seed(0)
    everything = kept()
    with activations_checkpointed(task.blocks()):
        assert kept() < 0.6 * everything
    torch.manual_seed(0)
    assert kept() == everything


def test_frozen_parts_keep_no_gradients_and_no_optimizer_state(tmp_path, fresh_model, monkeypatch):
    runs = []
    original = Trainer.__init__

    def remember(self, *args, **settings) -> None:
        original(self, *args, **settings)
        runs.append(self)

    monkeypatch.setattr(Trainer, "__init__", remember)
    model = fresh_model()
    train_san(model, Halves(), san_config(), tmp_path)
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    with_gradients = {id(parameter) for parameter in model.parameters() if parameter.grad is not None}
    assert with_gradients == trained == {id(parameter) for parameter in runs[0].optimizer.state}
    assert len(trained) < len(list(model.parameters()))
