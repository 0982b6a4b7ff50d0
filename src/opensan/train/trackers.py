"""Report a run to experiment trackers. Each tracker is imported when a run begins."""

import importlib.util
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL.Image import Image

from opensan.errors import UserError, install
from opensan.files import write_text
from opensan.train.log import RunLogger

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class _Tracker(RunLogger):
    """Base class of trackers. It opens nothing before `start`, which a run with wrong settings never reaches."""

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        """`folder` is the run's folder, whose name is the run's name; `settings` its configuration as plain data."""
        self.folder = folder
        self.project = project
        self.settings = dict(settings)


class TensorBoard(_Tracker):
    """Event files in FOLDER/tensorboard."""

    def start(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps after this one are repeated: purge what an earlier process wrote of them.
        self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def pictures(self, step: int, pictures: Mapping[str, Image]) -> None:
        for name, picture in pictures.items():
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        if hasattr(self, "_writer"):
            self._writer.close()


class WeightsAndBiases(_Tracker):
    """A run of wandb; a resumed run keeps its id, and wandb ignores steps that it has already."""

    def start(self, step: int) -> None:
        import wandb

        self._wandb = wandb
        identity = _kept(self.folder / "wandb.id") or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            project=self.project,
            name=self.folder.name,
            id=identity,
            resume="allow",
            dir=str(self.folder),
            config=self.settings,
        )
        write_text(self.folder / "wandb.id", identity)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def pictures(self, step: int, pictures: Mapping[str, Image]) -> None:
        self._run.log({name: self._wandb.Image(picture) for name, picture in pictures.items()}, step=step)

    def close(self) -> None:
        if hasattr(self, "_run"):
            self._run.finish()


class Trackio(_Tracker):
    """A run of trackio, which identifies runs by name; a resumed run keeps its name."""

    def start(self, step: int) -> None:
        import trackio

        self._trackio = trackio
        name = _kept(self.folder / "trackio.id") or f"{self.folder.name}-{uuid.uuid4().hex[:6]}"
        self._run = trackio.init(project=self.project, name=name, resume="allow", config=self.settings)
        write_text(self.folder / "trackio.id", name)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._trackio.log(dict(figures), step=step)

    def pictures(self, step: int, pictures: Mapping[str, Image]) -> None:
        images = {name: self._trackio.Image(np.asarray(picture.convert("RGB"))) for name, picture in pictures.items()}
        self._trackio.log(images, step=step)

    def close(self) -> None:
        if hasattr(self, "_run"):
            self._trackio.finish()


class MLflow(_Tracker):
    """A run of mlflow, at the address in mlflow's own variable MLFLOW_TRACKING_URI."""

    def start(self, step: int) -> None:
        import mlflow

        mlflow.set_experiment(self.project)
        identity = _kept(self.folder / "mlflow.id")
        run = mlflow.start_run(run_id=identity) if identity else mlflow.start_run(run_name=self.folder.name)
        self._mlflow = mlflow
        mlflow.log_dict(self.settings, "config.json")
        write_text(self.folder / "mlflow.id", run.info.run_id)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(figures), step=step)

    def pictures(self, step: int, pictures: Mapping[str, Image]) -> None:
        for name, picture in pictures.items():
            self._mlflow.log_image(picture, artifact_file=f"{name}/step-{step:08d}.png")

    def close(self) -> None:
        if hasattr(self, "_mlflow"):
            self._mlflow.end_run()


_TRACKERS: dict[TrackerName, type[_Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
    "mlflow": MLflow,
}


def make_trackers(
    names: Sequence[TrackerName], folder: Path, project: str, settings: Mapping[str, Any]
) -> list[RunLogger]:
    """Return the trackers for the run in `folder`, whose whole configuration is `settings`.

    Raises ValueError, one line with the command that helps, if a tracker's package is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"loggers: {name} is not installed: {install(name)}")
    return [_TRACKERS[name](folder, project, settings) for name in names]


def _kept(path: Path) -> str | None:
    """Return the tracker's name of the run, if an earlier process stored it."""
    return path.read_text(encoding="utf-8").strip() if path.exists() else None
