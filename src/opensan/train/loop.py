"""The training loop: steps, checkpoints, logs. It knows nothing of what is learned.

A run is a function of its configuration and its data: every random number is drawn from a generator seeded with
(seed, position in the stream) or (seed, step), so a run that was killed and started again goes on as if nothing had
happened, and n accumulated micro-batches see what n ranks would.
"""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL.Image import Image
from torch import Tensor, nn

from opensan.files import write_text
from opensan.train.checkpoint import CheckpointFolder
from opensan.train.config import HARMLESS, LoopConfig
from opensan.train.log import CsvLog, RunLogger, TrainingProgress, peak_memory_mib
from opensan.train.optimizer import ParameterGroup, build_adamw, clip_gradients, poly_factor, set_learning_rates
from opensan.train.stream import LoadedBatch, TrainingSource, stream

MOST_BAD_STEPS = 3
"""So many steps in a row with losses that are not finite stop the run."""

NAMES_SHOWN = 8


class Task(Protocol):
    """What is learned: an nn.Module whose forward pass gives losses."""

    def prepare(self, batches: Sequence[Any]) -> Any:
        """Called once a step with all of its micro-batches, before the first forward pass; may talk to other ranks."""

    def __call__(self, batch: Any, prepared: Any) -> dict[str, Tensor]:
        """Weighted losses by name; their sum is minimised."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    step: int
    """Steps done."""
    finished: bool
    """False: a signal asked it to stop; the same call goes on from here."""
    best: float | None
    """The best validation score so far."""


class Trainer:
    """One run in one folder: `checkpoints/`, `log.csv`, `validation.csv`, `config.json`."""

    def __init__(
        self,
        task: nn.Module,
        source: TrainingSource,
        groups: Sequence[ParameterGroup],
        config: LoopConfig,
        out: str | Path,
        *,
        device: torch.device | str = "cpu",
        description: Mapping[str, Any] | None = None,
        validate: Callable[[int], Mapping[str, float]] | None = None,
        best_by: str = "",
        loggers: Sequence[RunLogger] = (),
        panel: Callable[[int], Mapping[str, Image]] | None = None,
    ) -> None:
        """Set a run up.

        Args:
            task: a `Task`; moved to `device`.
            source: where its batches come from.
            groups: what is optimised. Only these parameters are kept in checkpoints.
            config: how long, how fast.
            out: the run's folder; one that holds a run of the same configuration is continued.
            description: the whole configuration as plain data, for config.json; default: `config`'s.
            validate: figures after step n, called every `config.validate_every` steps and after the last.
            best_by: the figure whose highest value marks the best checkpoint; empty: none is marked.
            loggers: where figures and pictures go besides the CSV files.
            panel: pictures after step n for the loggers, by name, made at every validation.
        """
        self.task = task.to(device)
        self.source = source
        self.groups = list(groups)
        self.config = config
        self.out = Path(out)
        self.device = torch.device(device)
        self.description = dict(description or {"loop": config.model_dump(mode="json")})
        self.validate = validate
        self.best_by = best_by
        self.loggers = tuple(loggers)
        self.panel = panel
        self.optimizer = build_adamw(self.groups)
        self.trained = [parameter for group in self.groups for parameter in group.parameters]
        self.step = 0
        self.best: float | None = None
        self._bad_steps = 0
        self._stop = False
        self._waited = 0.0

    def run(self) -> RunResult:
        """Train to the last step, or until SIGTERM or SIGINT, from where an earlier call left off.

        Raises:
            ValueError: `out` holds a run of another configuration, or another process trains into it.
            RuntimeError: three steps in a row without finite losses; the state before them is saved.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.out / ".lock", timeout=0), self._signals(), ExitStack() as closing:
                for logger in self.loggers:
                    closing.callback(logger.close)
                return self._run()
        except Timeout:
            raise ValueError(f"{self.out}: another process is training into this folder") from None

    def _run(self) -> RunResult:
        self._check_configuration()
        self.checkpoints = CheckpointFolder(self.out / "checkpoints", self.config.keep)
        config = self.config
        with TrainingProgress(config.steps, self.step) as progress:
            self._resume(progress)
            self._log = CsvLog(self.out / "log.csv", self.step)
            self._validation_log = CsvLog(self.out / "validation.csv", self.step)
            for logger in self.loggers:
                logger.start(self.step)
            self.task.train()
            saved = self.step
            since, seen = time.perf_counter(), self.step
            for batches in self._timed_stream():
                figures = self._take_step(batches, progress)
                self.step += 1
                progress.advance(self.step)
                if self.step % config.log_every == 0 or self.step == config.steps:
                    now = time.perf_counter()
                    figures |= self._speed(now - since, self.step - seen)
                    since, seen = now, self.step
                    self._log.add(self.step, figures)
                    for logger in self.loggers:
                        logger.log(self.step, figures)
                    progress.show(self.step, figures)
                self._maybe_validate(progress)
                if self.step % config.save_every == 0 or self.step == config.steps or self._stop:
                    self.save()
                    saved = self.step
                if self._stop:
                    progress.say(
                        f"stopped by a signal after step {self.step}; saved, the same command goes on from here"
                    )
                    break
            assert saved == self.step
        return RunResult(self.step, self.step == config.steps, self.best)

    def _timed_stream(self) -> Iterator[Sequence[LoadedBatch]]:
        """The stream from the current step, adding up the time spent waiting for it."""
        config = self.config
        batches = stream(
            self.source,
            seed=config.seed,
            first_step=self.step,
            steps=config.steps,
            batch_size=config.batch_size,
            accumulate=config.accumulate,
            workers=config.workers,
            pin_memory=False,
        )
        while True:
            start = time.perf_counter()
            step = next(batches, None)
            self._waited += time.perf_counter() - start
            if step is None:
                return
            yield step

    def _take_step(self, loaded: Sequence[LoadedBatch], progress: TrainingProgress) -> dict[str, float | str]:
        """Forward, backward and update; the figures of the step. Without finite losses and gradients: no update."""
        for one in loaded:
            for reason in one.broken:
                progress.say(f"skipped a broken sample: {reason}")
        set_learning_rates(self.optimizer, self._rate_factor())
        self.optimizer.zero_grad(set_to_none=True)
        batches = [one.batch.to(self.device) for one in loaded]
        prepared = self.task.prepare(batches)
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            torch.manual_seed(self._random_seed(number))
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bfloat16"):
                losses = self.task(batch, prepared)
            total = sum(losses.values()) / len(batches)
            total.backward()
            for name, value in {"loss": total * len(batches), **losses}.items():
                sums[name] = sums.get(name, 0) + value.detach() / len(batches)
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        norm = clip_gradients(self.trained, limit)
        # One copy to the host for all figures of a step.
        values = torch.stack([*(value.double() for value in sums.values()), norm.double()]).tolist()
        figures = dict(zip((*sums, "gradient_norm"), values, strict=True))
        if all(map(math.isfinite, values)):
            self.optimizer.step()
            self._bad_steps = 0
        else:
            self._report_bad_step(figures, loaded, progress)
        return {"learning_rate": self.optimizer.param_groups[0]["lr"], **figures}

    def _rate_factor(self) -> float:
        return poly_factor(self.step, self.config.steps, self.config.poly_power, self.config.warmup)

    def _random_seed(self, micro_batch: int) -> int:
        """For torch's generators, which the task may draw from."""
        sequence = np.random.SeedSequence([self.config.seed, 2, self.step, micro_batch])
        return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _report_bad_step(
        self, figures: Mapping[str, float], loaded: Sequence[LoadedBatch], progress: TrainingProgress
    ) -> None:
        self._bad_steps += 1
        names = [name for one in loaded for name in one.names]
        shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
        wrong = ", ".join(f"{name} {value}" for name, value in figures.items() if not math.isfinite(value))
        progress.say(f"step {self.step} skipped: {wrong}, with {shown}")
        if self._bad_steps == MOST_BAD_STEPS:
            self.step += 1
            self.save()
            raise RuntimeError(
                f"{MOST_BAD_STEPS} steps in a row had no finite losses (the last: {wrong}, with {shown}); "
                f"the weights before them are saved in {self.out / 'checkpoints'}"
            )

    def _speed(self, seconds: float, steps: int) -> dict[str, float]:
        samples = steps * self.config.batch_size * self.config.accumulate
        waited, self._waited = self._waited, 0.0
        return {
            "samples_per_second": samples / seconds,
            "waiting_for_data": waited / seconds,
            "peak_memory_mib": peak_memory_mib(self.device),
        }

    def _maybe_validate(self, progress: TrainingProgress) -> None:
        every = self.config.validate_every
        if self.validate is None or not every or (self.step % every and self.step != self.config.steps):
            return
        self.task.eval()
        with torch.no_grad():
            figures = dict(self.validate(self.step))
            pictures = self.panel(self.step) if self.panel else {}
        self.task.train()
        self._validation_log.add(self.step, figures)
        for logger in self.loggers:
            logger.log(self.step, {f"validation/{name}": value for name, value in figures.items()})
            if pictures:
                logger.pictures(self.step, pictures)
        progress.say(f"step {self.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        if self.best_by and (self.best is None or figures[self.best_by] > self.best):
            self.best = figures[self.best_by]
            self.checkpoints.save(self._state(), self.step, kind="best")

    def save(self) -> Path:
        """Write a checkpoint of the current step."""
        return self.checkpoints.save(self._state(), self.step)

    def _state(self) -> dict[str, Any]:
        """Everything the run consists of. The generators' states are not among it: they follow from seed and step."""
        return {
            "format": 1,
            "step": self.step,
            "best": self.best,
            "bad_steps": self._bad_steps,
            "parameters": {name: parameter.detach() for name, parameter in _by_name(self.groups).items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def _resume(self, progress: TrainingProgress) -> None:
        state, messages = self.checkpoints.load_newest()
        for message in messages:
            progress.say(message)
        if state is None:
            return
        load_parameters(self.groups, state["parameters"], str(self.out))
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self._bad_steps = state["step"], state["best"], state["bad_steps"]
        progress.advance(self.step)
        progress.say(f"continuing {self.out} after step {self.step}")

    def _check_configuration(self) -> None:
        """Refuse to continue a run with settings that would change its numbers; write config.json."""
        path = self.out / "config.json"
        ours = json.loads(json.dumps(self.description))
        if path.exists():
            theirs = json.loads(path.read_text(encoding="utf-8"))
            for key, here, there in _changes(ours, theirs):
                if key.removeprefix("loop.") not in HARMLESS:
                    raise ValueError(
                        f"{self.out}: holds a run with {key} = {there}, not {here}; choose another folder, or remove it"
                    )
        write_text(path, json.dumps(ours, indent=2) + "\n")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run after the current step. A second one acts as it usually does."""

        def stop(number: int, _frame: Any) -> None:
            self._stop = True
            signal.signal(number, previous[number])

        self._stop = False
        try:
            previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: signals are someone else's business
            previous = {}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def load_parameters(groups: Sequence[ParameterGroup], saved: Mapping[str, Tensor], source: str) -> None:
    """Copy saved values into the groups' parameters. Raises ValueError if names or shapes differ."""
    own = _by_name(groups)
    if own.keys() != saved.keys():
        raise ValueError(f"{source}: the checkpoint is of another model: {sorted(own.keys() ^ saved.keys())[:5]}")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != saved[name].shape:
                raise ValueError(
                    f"{source}: {name} is {tuple(saved[name].shape)} in the checkpoint, {tuple(parameter.shape)} here"
                )
            parameter.copy_(saved[name])


def _by_name(groups: Sequence[ParameterGroup]) -> dict[str, nn.Parameter]:
    return {name: p for group in groups for name, p in zip(group.names, group.parameters, strict=True)}


def _changes(ours: Any, theirs: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two trees of plain data differ: (dotted key, ours, theirs)."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            yield from _changes(ours.get(name), theirs.get(name), f"{key}.{name}" if key else name)
    elif ours != theirs:
        yield key, ours, theirs
