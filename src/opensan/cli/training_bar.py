"""Draw the progress of a training on a terminal."""

from collections.abc import Iterable, Mapping

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from opensan.train.log import TrainingProgress, summary


class _BarAndFigures(Progress):
    """A progress bar with a line of figures below it, because both do not fit on one line."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            yield Text(task.fields["figures"])


class TrainingBar(TrainingProgress):
    """Draws a bar with the newest figures; events are lines above it."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._bar = _BarAndFigures(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
        )

    def begin(self, steps: int, done: int) -> "TrainingBar":
        """Begin to draw; see `TrainingProgress.begin`."""
        self._task = self._bar.add_task("training", total=steps, completed=done, figures="")
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        """Draw that `step` steps are done."""
        self._bar.update(self._task, completed=step)

    def show(self, step: int, figures: Mapping[str, float]) -> None:
        """Draw the newest figures."""
        self._bar.update(self._task, figures=summary(figures))

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)
