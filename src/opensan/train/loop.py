"""The training loop: steps, checkpoints, logs, for any task.

A run is a function of its configuration and its data: every random number is drawn from a generator seeded with
(seed, position in the stream) or (seed, step), so a run that was killed and started again continues as if nothing had
happened, and n accumulated micro-batches are the same as those of n ranks.
"""

import itertools
import json
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from opensan.distributed import gather_objects, is_main, on_main, rank, sum_over_ranks, world_size
from opensan.errors import UserError
from opensan.files import hold, remove_temporaries, write_text
from opensan.train.checkpoint import CheckpointFolder
from opensan.train.config import HARMLESS, LoopConfig
from opensan.train.log import CsvLog, NoProgress, RunLogger, TrainingProgress, peak_memory_mib
from opensan.train.optimizer import ParameterGroup, build_adamw, clip_gradients, poly_factor, set_learning_rates
from opensan.train.parallel import (
    activations_checkpointed,
    gradients_exchanged,
    load_optimizer_state,
    optimizer_state,
    split_like,
    spread,
    whole,
    whole_task,
)
from opensan.train.precision import LossScale, autocast_dtype
from opensan.train.stream import DatasetMixture, LoadedBatch, TrainingSource, stream

MOST_BAD_STEPS = 3
"""So many steps in a row with losses that are not finite stop the run."""

NAMES_SHOWN = 8


class Diverged(RuntimeError):
    """A run that cannot go on, because its losses are not finite."""


class Task(Protocol):
    """The task to train: an nn.Module whose forward pass returns losses."""

    def prepare(self, batches: Sequence[Any]) -> Any:
        """Compute values for all micro-batches of a step before its forward passes; may talk to other ranks."""

    def __call__(self, batch: Any, prepared: Any) -> dict[str, Tensor]:
        """Return weighted losses by name; their sum is minimised."""


class Follower(Protocol):
    """Something that follows a training, as an average of its weights does, and is a part of its checkpoints."""

    def follow(self, step: int) -> None:
        """Take over the weights after `step` steps."""

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold, which later steps do not change."""

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Continue from `state`, which was returned after `step` steps."""

    def figures(self) -> dict[str, float]:
        """Return figures for the log, always of the same names."""


@dataclass(frozen=True)
class RunResult:
    """State of a run at its end."""

    step: int
    """Steps done: all, or fewer where patience ended."""
    finished: bool
    """False if a signal stopped it; the same call continues from here."""
    best: float | None
    """The best validation score so far."""
    broken: int
    """Number of samples that could not be read and were replaced by others."""


class Trainer:
    """One run in one folder: `checkpoints/`, `log.csv`, `validation.csv`, `config.json`.

    Started by torchrun, inside `opensan.distributed.process_group`, the processes train together: each has batches of
    its own, all make the same update, and the main one writes. An event in one of them has the same effect in all.
    """

    def __init__(
        self,
        task: nn.Module,
        source: TrainingSource | DatasetMixture,
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
        blocks: Sequence[nn.Module] = (),
        progress: TrainingProgress | None = None,
        follower: Follower | None = None,
    ) -> None:
        """Set a run up.

        Args:
            task: a `Task`; moved to `device`.
            source: the source of its batches.
            groups: the parameters to optimise. Only these are kept in checkpoints.
            config: settings of the loop.
            out: the run's folder; one that holds a run of the same configuration is continued.
            description: the whole configuration as plain data, for config.json; default: `config`'s.
            validate: figures after step n, called every `config.validate_every` steps and after the last; in every
                process, so that they may share the work, but only the main one's figures count.
            best_by: the figure whose highest value marks the best checkpoint; empty: none is marked.
            loggers: where figures and pictures go besides the CSV files.
            panel: pictures after step n for the loggers, by name, made at every validation in the main process.
            blocks: modules of `task`, each called as a whole, that activation checkpointing and FSDP take one by one.
            progress: what reports the run's progress in the main process; None: lines on stderr.
            follower: what follows the weights, in every process.
        """
        self.task = task.to(device)
        self.source = source
        self.config = config
        self.out = Path(out)
        self.device = torch.device(device)
        self.description = dict(description or {"loop": config.model_dump(mode="json")})
        self.validate = validate
        self.best_by = best_by
        self.loggers = tuple(loggers) if is_main() else ()
        self.panel = panel
        self.progress = (progress or TrainingProgress()) if is_main() else NoProgress()
        self._task_groups = list(groups)
        self._model, self.groups, self._blocks = spread(self.task, groups, blocks, config.parallel)
        self.optimizer = build_adamw(self.groups)
        self.trained = [parameter for group in self.groups for parameter in group.parameters]
        self.step = 0
        self.best: float | None = None
        self.best_step = 0
        self.broken = 0
        self.follower = follower
        self._scale = LossScale(autocast_dtype(config.precision, self.device) is torch.float16)
        self._bad_steps = 0
        self._stop = False
        self._waited = 0.0

    def run(self) -> RunResult:
        """Train to the last step, or until SIGTERM or SIGINT, from where an earlier call left off.

        Raises:
            ValueError: `out` holds a run of another configuration, or another process trains into it.
            Diverged: three steps in a row without finite losses; the state before them is saved.
        """
        with ExitStack() as held:
            on_main(lambda: self._take(held))
            with self._signals(), ExitStack() as closing:
                if self.config.activation_checkpointing:
                    closing.enter_context(activations_checkpointed(self._blocks))
                for logger in self.loggers:
                    closing.callback(logger.close)
                return self._run()

    def _take(self, held: ExitStack) -> None:
        """Hold the folder, and remove temporary files of a killed run."""
        self.out.mkdir(parents=True, exist_ok=True)
        held.enter_context(hold(self.out / ".lock", f"{self.out}: another process is training into this folder"))
        for folder in (self.out, *(path for path in self.out.iterdir() if path.is_dir())):
            remove_temporaries(folder)

    def _run(self) -> RunResult:
        on_main(self._open_folder)
        config = self.config
        self._resume(self.progress)
        with self.progress.begin(config.steps, self.step) as progress, ExitStack() as at_the_end:
            self._open_logs()
            self._model.train()
            saved = self.step
            since, seen, first = time.perf_counter(), self.step, self.step + 1
            for batches in at_the_end.enter_context(closing(self._timed_stream())):
                if self._patience_ended():
                    break
                figures, stop = self._take_step(batches, progress)
                self.step += 1
                if self.follower is not None:
                    self.follower.follow(self.step)
                progress.advance(self.step)
                if self.step % config.log_every == 0 or self.step == config.steps:
                    now = time.perf_counter()
                    figures |= self._speed(now - since, self.step - seen)
                    figures |= {} if self.follower is None else self.follower.figures()
                    since, seen = now, self.step
                    self._log_figures(figures, progress)
                elif self.step == first:
                    progress.show(self.step, figures)
                pause = time.perf_counter()
                self._maybe_validate(progress)
                since += time.perf_counter() - pause  # throughput is the training's
                ended = self._patience_ended()
                if self.step % config.save_every == 0 or self.step == config.steps or stop or ended:
                    self.save()
                    saved = self.step
                if ended:
                    progress.say(f"ended after step {self.step}: no better score since step {self.best_step}")
                    break
                if stop:
                    progress.say(
                        f"stopped by a signal after step {self.step}; saved, the same command goes on from here"
                    )
                    break
            assert saved == self.step
            with self._whole_task():
                pass  # the caller's model has what was reached
            if self.broken:
                progress.say(f"{self.broken} broken samples were skipped in this run, others taken in their place")
        finished = self.step == config.steps or self._patience_ended()
        return RunResult(self.step, finished, self.best, self.broken)

    def _patience_ended(self) -> bool:
        """Return whether so many validations as `patience` allows have passed since the best one."""
        waited = self.config.patience * self.config.validate_every
        return bool(self.best_by and waited and self.step >= self.best_step + waited)

    def _timed_stream(self) -> Generator[Sequence[LoadedBatch]]:
        """Yield the stream from the current step, and add up the time spent waiting for it."""
        config = self.config
        batches = stream(
            self.source,
            seed=config.seed,
            first_step=self.step,
            steps=config.steps,
            batch_size=config.batch_size,
            accumulate=config.accumulate,
            workers=config.workers,
            rank=rank(),
            world=world_size(),
            pin_memory=self.device.type == "cuda",
        )
        with closing(cast("Generator[Sequence[LoadedBatch]]", batches)):
            while True:
                start = time.perf_counter()
                step = next(batches, None)
                self._waited += time.perf_counter() - start
                if step is None:
                    return
                yield step

    def _take_step(self, loaded: Sequence[LoadedBatch], progress: TrainingProgress) -> tuple[dict[str, float], bool]:
        """Run forward and backward passes and update the weights, unless losses or gradients are not finite.

        Returns the figures of the step, and whether a signal asked any of the processes to stop.
        """
        set_learning_rates(self.optimizer, self._rate_factor())
        names, losses = self._backward(loaded)
        self._scale.remove_from(self.trained)
        norm = whole(clip_gradients(self.trained, math.inf if self.config.clip_norm is None else self.config.clip_norm))
        broken = [reason for batch in loaded for reason in batch.broken]
        own = losses.new_tensor([len(broken), self._stop])
        shared = sum_over_ranks(torch.cat((losses.mean(0), own)))
        # One copy to the host for all figures of a step.
        *sums, new_broken, stop, gradient_norm = torch.cat((shared, norm.double().view(1))).tolist()
        figures = {name: value / world_size() for name, value in zip(names, sums, strict=True)}
        figures["gradient_norm"] = gradient_norm
        if new_broken:
            self._report_broken(broken, progress)
        # Logged in every run, as a run may continue in another number format. Its name lacks "loss": losses are summed.
        others = {"gradient_scale": self._scale.value, "broken_samples": self.broken}
        self._update(figures, losses, loaded, progress)
        rate = self.optimizer.param_groups[0]["lr"]
        return {"learning_rate": rate, **figures, **others}, bool(stop)

    def _backward(self, loaded: Sequence[LoadedBatch]) -> tuple[list[str], Tensor]:
        """Compute gradients of the mean of all processes' micro-batches; return losses, [micro-batches, names]."""
        self.optimizer.zero_grad(set_to_none=True)
        batches = [item.batch.to(self.device) for item in loaded]
        prepared = cast(Task, self.task).prepare(batches)
        dtype = autocast_dtype(self.config.precision, self.device)
        names, rows = [], []
        for number, batch in enumerate(batches):
            torch.manual_seed(self._random_seed(rank() * len(batches) + number))
            with gradients_exchanged(self._model, number == len(batches) - 1):
                with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                    losses = self._model(batch, prepared)
                total = sum(losses.values()) / len(batches)
                (total * self._scale.value).backward()
            names = ["loss", *losses]
            rows.append(torch.stack([total * len(batches), *losses.values()]).detach().double())
        return names, torch.stack(rows)

    def _rate_factor(self) -> float:
        return poly_factor(self.step, self.config.steps, self.config.poly_power, self.config.warmup)

    def _random_seed(self, micro_batch: int) -> int:
        """Return the seed of torch's generators for a micro-batch, counted over all processes."""
        sequence = np.random.SeedSequence([self.config.seed, 2, self.step, micro_batch])
        return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))

    def _update(
        self, figures: Mapping[str, float], losses: Tensor, loaded: Sequence[LoadedBatch], progress: TrainingProgress
    ) -> None:
        """Take the optimizer's step if everything is finite. The figures are shared, so all processes decide alike."""
        wrong = {name: value for name, value in figures.items() if not math.isfinite(value)}
        if not wrong:
            self.optimizer.step()
            self._bad_steps = 0
            self._scale.step_was_good()
        elif wrong.keys() == {"gradient_norm"} and self._scale.shrink():
            progress.say(f"step {self.step} skipped: float16 gradients overflow; loss scale now {self._scale.value:g}")
        else:
            shown = ", ".join(f"{name} {value}" for name, value in wrong.items())
            self._report_bad_step(shown, losses, loaded, progress)

    def _report_broken(self, reasons: Sequence[str], progress: TrainingProgress) -> None:
        for reason in itertools.chain.from_iterable(gather_objects(reasons)):
            self.broken += 1
            progress.say(f"skipped a broken sample: {reason}")

    def _report_bad_step(
        self, wrong: str, losses: Tensor, loaded: Sequence[LoadedBatch], progress: TrainingProgress
    ) -> None:
        self._bad_steps += 1
        bad = (~losses.isfinite()).any(1).tolist()
        culprits = [name for batch, is_bad in zip(loaded, bad, strict=True) if is_bad for name in batch.names]
        suspects = [name for batch in loaded for name in batch.names]
        everyone = gather_objects((culprits, suspects))
        # Where all losses are finite, the gradients are not, and any sample may have caused it.
        names = [name for own, _ in everyone for name in own] or [name for _, all_ in everyone for name in all_]
        shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
        progress.say(f"step {self.step} skipped: {wrong}, with {shown}")
        if self._bad_steps >= MOST_BAD_STEPS:  # more in a run that was stopped by this before, and continued
            self.step += 1
            self.save()
            raise Diverged(
                f"{MOST_BAD_STEPS} steps in a row had no finite losses (the last: {wrong}, with {shown}); "
                f"the weights before them are saved in {self.out / 'checkpoints'}"
            )

    def _speed(self, seconds: float, steps: int) -> dict[str, float]:
        samples = steps * self.config.batch_size * self.config.accumulate * world_size()
        waited, self._waited = self._waited, 0.0
        return {
            "samples_per_second": samples / seconds,
            "waiting_for_data": waited / seconds,
            "peak_memory_mib": peak_memory_mib(self.device),
        }

    def _open_logs(self) -> None:
        if is_main():
            self._log = CsvLog(self.out / "log.csv", self.step)
            self._validation_log = CsvLog(self.out / "validation.csv", self.step)
        for logger in self.loggers:
            logger.start(self.step)

    def _log_figures(self, figures: Mapping[str, float], progress: TrainingProgress) -> None:
        progress.show(self.step, figures)
        if is_main():
            self._log.add(self.step, figures)
        for logger in self.loggers:
            logger.log(self.step, figures)

    def _maybe_validate(self, progress: TrainingProgress) -> None:
        every = self.config.validate_every
        if self.validate is None or not every or (self.step % every and self.step != self.config.steps):
            return
        self.task.eval()
        with torch.no_grad(), self._whole_task():
            figures = gather_objects(dict(self.validate(self.step)))[0]
            pictures = self.panel(self.step) if self.panel and self.loggers else {}
        self._model.train()
        if is_main():
            self._validation_log.add(self.step, figures)
        for logger in self.loggers:
            logger.log(self.step, {f"validation/{name}": value for name, value in figures.items()})
            if pictures:
                logger.pictures(self.step, pictures)
        progress.say(f"step {self.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
        if self.best_by and (self.best is None or math.isnan(self.best) or figures[self.best_by] > self.best):
            self.best, self.best_step = figures[self.best_by], self.step
            self.save(kind="best")

    def _whole_task(self) -> AbstractContextManager[None]:
        """Give `task` the trained values for the `with` block; every process must enter."""
        return whole_task(self.task, self._task_groups, self.groups, self.device)

    def save(self, kind: str = "step") -> None:
        """Write a checkpoint of the current step. All processes must call it; the main one writes."""
        state = self._state()
        on_main(lambda: self.checkpoints.save(state, self.step, kind=kind))

    def _state(self) -> dict[str, Any]:
        """Return the run's whole state. Generators are not part of it: they are seeded by seed and step."""
        followed = {} if self.follower is None else {"follower": self.follower.state()}
        return {
            **followed,
            "format": 2,
            "step": self.step,
            "best": self.best,
            "best_step": self.best_step,
            "broken": self.broken,
            "bad_steps": self._bad_steps,
            "loss_scale": self._scale.state(),
            "parameters": {name: whole(parameter.detach()) for name, parameter in _by_name(self.groups).items()},
            "optimizer": optimizer_state(self.optimizer),
        }

    def _resume(self, progress: TrainingProgress) -> None:
        state, messages = on_main(lambda: self.checkpoints.load_newest())
        for message in messages:
            progress.say(message)
        if state is None:
            return
        load_parameters(self.groups, state["parameters"], str(self.out))
        load_optimizer_state(self.optimizer, state["optimizer"])
        self._scale.load(state["loss_scale"])
        self.step, self.best, self._bad_steps = state["step"], state["best"], state["bad_steps"]
        self.broken = state["broken"]
        self.best_step = state.get("best_step", self.step)  # runs of earlier versions had no patience
        if self.follower is not None:
            self.follower.load(state["follower"], self.step)
        if self.best_by and (best := on_main(self._best_saved)) is not None:
            self.best, self.best_step = best  # of a later validation: it is not to be replaced by a worse one
        progress.say(f"continuing {self.out} after step {self.step}")

    def _best_saved(self) -> tuple[float, int] | None:
        """Return the score of the best checkpoint on disk, and its step."""
        try:
            state = self.checkpoints.load_best()
        except UserError:
            return None  # damaged: another is saved at the next improvement
        return None if state is None or state["best"] is None else (state["best"], state["step"])

    def _open_folder(self) -> None:
        self._check_configuration()
        self.checkpoints = CheckpointFolder(self.out / "checkpoints", self.config.keep)

    def _check_configuration(self) -> None:
        """Refuse to continue a run with settings that would change its numbers; write config.json."""
        path = self.out / "config.json"
        ours = json.loads(json.dumps(self.description))
        ours["micro_batches_a_step"] = self.config.accumulate * world_size()
        if path.exists():
            theirs = json.loads(path.read_text(encoding="utf-8"))
            for key, here, there in _changes(ours, theirs):
                if key.removeprefix("loop.") not in HARMLESS:
                    raise UserError(
                        f"{self.out}: holds a run with {key} = {there}, not {here}; choose another folder, or remove it"
                    )
        write_text(path, json.dumps(ours, indent=2) + "\n")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Make SIGTERM and SIGINT end the run after the current step. A second signal has its usual effect.

        Under torchrun further signals are ignored: it forwards signals that the processes have had from the terminal
        already, and kills processes that do not exit in time.
        """

        def stop(number: int, _frame: Any) -> None:
            self._stop = True
            if world_size() == 1:
                signal.signal(number, previous[signal.Signals(number)])

        self._stop = False
        try:
            previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread, which handles signals
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
        raise UserError(f"{source}: the checkpoint is of another model: {sorted(own.keys() ^ saved.keys())[:5]}")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != saved[name].shape:
                raise UserError(
                    f"{source}: {name} is {tuple(saved[name].shape)} in the checkpoint, {tuple(parameter.shape)} here"
                )
            parameter.copy_(split_like(saved[name], parameter))


def _by_name(groups: Sequence[ParameterGroup]) -> dict[str, nn.Parameter]:
    return {name: p for group in groups for name, p in zip(group.names, group.parameters, strict=True)}


def _changes(ours: Any, theirs: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the differences of two trees of plain data: (dotted key, ours, theirs)."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            yield from _changes(ours.get(name), theirs.get(name), f"{key}.{name}" if key else name)
    elif ours != theirs:
        yield key, ours, theirs
