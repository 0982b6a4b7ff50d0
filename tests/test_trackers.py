"""Runs reported to experiment trackers: what each is told, and that a run that goes on stays one run."""

import sys
import types

import pytest
from PIL import Image

from opensan.train import trackers
from opensan.train.trackers import make_trackers

PICTURE = Image.new("RGB", (6, 4), (10, 200, 30))


class Recorder(types.ModuleType):
    """Stands in for a tracker's package: notes every call, and answers with itself."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls = []
        self.id = self.run_id = "given"
        self.info = self

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments, **named):
            self.calls.append((name, arguments, named))
            return self

        return call

    def called(self, name: str) -> list[tuple[tuple, dict]]:
        return [(arguments, named) for called, arguments, named in self.calls if called == name]


@pytest.fixture
def package(monkeypatch):
    """Installs a recorder under a package's name."""

    def install(name: str) -> Recorder:
        recorder = Recorder(name)
        monkeypatch.setitem(sys.modules, name, recorder)
        monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _name: True)
        return recorder

    return install


def one_run(name, folder, step=0):
    [tracker] = make_trackers([name], folder, "streets", {"loop": {"steps": 3}})
    tracker.start(step)
    tracker.log(step + 1, {"loss": 0.5})
    tracker.pictures(step + 1, {"validation": PICTURE})
    tracker.close()


def test_wandb(tmp_path, package):
    wandb = package("wandb")
    one_run("wandb", tmp_path)
    one_run("wandb", tmp_path, step=1)
    first, second = (named for _, named in wandb.called("init"))
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert (first["project"], first["name"], first["config"]) == ("streets", tmp_path.name, {"loop": {"steps": 3}})
    assert (({"loss": 0.5},), {"step": 2}) in wandb.called("log")
    assert wandb.called("Image")[0][0][0] is PICTURE
    assert len(wandb.called("finish")) == 2


def test_trackio(tmp_path, package):
    trackio = package("trackio")
    one_run("trackio", tmp_path)
    one_run("trackio", tmp_path, step=1)
    first, second = (named for _, named in trackio.called("init"))
    assert first["name"] == second["name"] and first["name"].startswith(tmp_path.name)
    assert (({"loss": 0.5},), {"step": 1}) in trackio.called("log")
    assert trackio.called("Image")[0][0][0].shape == (4, 6, 3)
    assert len(trackio.called("finish")) == 2


def test_mlflow(tmp_path, package):
    mlflow = package("mlflow")
    one_run("mlflow", tmp_path)
    one_run("mlflow", tmp_path, step=1)
    assert [named for _, named in mlflow.called("start_run")] == [{"run_name": tmp_path.name}, {"run_id": "given"}]
    assert (({"loss": 0.5},), {"step": 2}) in mlflow.called("log_metrics")
    assert mlflow.called("log_image")[0] == ((PICTURE,), {"artifact_file": "validation/step-00000001.png"})
    assert len(mlflow.called("end_run")) == 2


def test_tensorboard_hides_the_steps_that_come_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def train(step: int, values: list[float]) -> None:
        [tracker] = make_trackers(["tensorboard"], tmp_path, "streets", {})
        tracker.start(step)
        for number, value in enumerate(values, start=step + 1):
            tracker.log(number, {"loss": value})
        tracker.pictures(step + len(values), {"validation": PICTURE})
        tracker.close()

    train(0, [4.0, 3.0, 2.5])  # killed after step 3, whose last checkpoint is of step 2
    train(2, [2.0, 1.0])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    image = events.Images("validation")[-1]
    assert (image.step, image.width, image.height) == (4, 6, 4)


def test_a_run_that_never_began_opens_nothing(tmp_path, package):
    wandb = package("wandb")
    [tracker] = make_trackers(["wandb"], tmp_path, "streets", {})
    tracker.close()
    assert wandb.calls == []


def test_a_missing_package_is_told_with_the_command_that_helps(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"loggers: mlflow is not installed: pip install '\.\[mlflow\]'"):
        make_trackers(["mlflow"], tmp_path, "streets", {})
