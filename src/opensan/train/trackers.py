"""Experiment trackers that a run can report to, besides its own files. Each is imported when it is asked for."""

import importlib.util
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from opensan.files import write_text

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]

Figures = Mapping[str, float]
Pictures = Mapping[str, Image.Image]


class TensorBoard:
    """Event files in `folder`/tensorboard."""

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        self._folder = folder / "tensorboard"
        self._writer = None

    def _open(self, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # A run that goes on repeats the steps after its last checkpoint: what was written of them before is hidden.
        self._writer = self._writer or SummaryWriter(str(self._folder), purge_step=step)
        return self._writer

    def log(self, step: int, figures: Figures) -> None:
        for name, value in figures.items():
            self._open(step).add_scalar(name, value, step)

    def pictures(self, step: int, pictures: Pictures) -> None:
        for name, picture in pictures.items():
            self._open(step).add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """A run of wandb; one that goes on has the id it had."""

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        identity = _kept_id(folder / "wandb.id") or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            project=project, name=folder.name, id=identity, resume="allow", dir=str(folder), config=dict(settings)
        )
        write_text(folder / "wandb.id", identity)

    def log(self, step: int, figures: Figures) -> None:
        self._run.log(dict(figures), step=step)

    def pictures(self, step: int, pictures: Pictures) -> None:
        self._run.log({name: self._wandb.Image(picture) for name, picture in pictures.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of trackio, which knows runs by their names; one that goes on has the name it had."""

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        name = _kept_id(folder / "trackio.id") or f"{folder.name}-{uuid.uuid4().hex[:6]}"
        self._run = trackio.init(project=project, name=name, resume="allow", config=dict(settings))
        write_text(folder / "trackio.id", name)

    def log(self, step: int, figures: Figures) -> None:
        self._trackio.log(dict(figures), step=step)

    def pictures(self, step: int, pictures: Pictures) -> None:
        made = {name: self._trackio.Image(np.asarray(picture.convert("RGB"))) for name, picture in pictures.items()}
        self._trackio.log(made, step=step)

    def close(self) -> None:
        self._trackio.finish()


class MLflow:
    """A run of mlflow, at the address that its own variables (MLFLOW_TRACKING_URI) give."""

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(project)
        if identity := _kept_id(folder / "mlflow.id"):
            mlflow.start_run(run_id=identity)
        else:
            run = mlflow.start_run(run_name=folder.name)
            mlflow.log_dict(dict(settings), "config.json")
            write_text(folder / "mlflow.id", run.info.run_id)

    def log(self, step: int, figures: Figures) -> None:
        self._mlflow.log_metrics(dict(figures), step=step)

    def pictures(self, step: int, pictures: Pictures) -> None:
        for name, picture in pictures.items():
            self._mlflow.log_image(picture, f"{name}/step-{step:08d}.png")

    def close(self) -> None:
        self._mlflow.end_run()


_TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio, "mlflow": MLflow}


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Raise ValueError, one line with the command that helps, if a tracker's package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"loggers: {name} is not installed: pip install 'opensan[{name}]'")


def open_trackers(
    names: Sequence[TrackerName], folder: Path, project: str, settings: Mapping[str, Any]
) -> list[TensorBoard | WeightsAndBiases | Trackio | MLflow]:
    """Start reporting a run; `settings` is its whole configuration as plain data."""
    check_trackers(names)
    folder.mkdir(parents=True, exist_ok=True)
    return [_TRACKERS[name](folder, project, settings) for name in names]


def _kept_id(path: Path) -> str | None:
    return path.read_text(encoding="utf-8").strip() if path.exists() else None
