"""Write a run's files for people: the configuration, validation pictures, and charts of the curves."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from PIL.Image import Image

from opensan.files import atomic_path, write_text
from opensan.outputs.charts import Series, charts
from opensan.recipe.config import RecipeConfig
from opensan.recipe.show import to_yaml

LAST_BLOCK = {"class": "loss_ce", "mask": "loss_mask", "dice": "loss_dice"}


class RunFolderFiles:
    """A `RunLogger` that writes `recipe.yaml`, `curves.png` and `validation/step-00001000.png` to the run's folder."""

    def __init__(self, recipe: RecipeConfig) -> None:
        self.folder = recipe.out
        self._recipe = recipe
        self._begun = False

    def start(self, step: int) -> None:
        self._begun = True
        write_text(self.folder / "recipe.yaml", to_yaml(self._recipe))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if any(name.startswith("validation/") for name in figures):
            self._draw()

    def pictures(self, step: int, pictures: Mapping[str, Image]) -> None:
        for name, picture in pictures.items():
            folder = self.folder / name
            folder.mkdir(exist_ok=True)
            with atomic_path(folder / f"step-{step:08d}.png") as temporary:
                picture.save(temporary)

    def close(self) -> None:
        if self._begun:
            self._draw()

    def _draw(self) -> None:
        """Draw the curves from the CSV files, which hold the whole run even if it was resumed."""
        log, validation = _columns(self.folder / "log.csv"), _columns(self.folder / "validation.csv")
        picture = charts(
            {
                "loss": _series(log, {"loss": "loss"}),
                "losses of the last block": _series(log, LAST_BLOCK),
                "mIoU in validation": _series(validation, {"miou": "miou"}),
                "learning rate": _series(log, {"learning rate": "learning_rate"}),
            }
        )
        with atomic_path(self.folder / "curves.png") as temporary:
            picture.save(temporary)


def _columns(path: Path) -> dict[str, list[float]]:
    """Return the columns of the whole rows: a full disk may have cut off the last one, or all of the file."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    names, *rows = csv.reader(io.StringIO(text[: text.rfind("\n") + 1])) if "\n" in text else [[]]
    return {
        name: [float(value) for value in values] for name, values in zip(names, zip(*rows, strict=True), strict=False)
    }


def _series(columns: Mapping[str, list[float]], columns_of_lines: Mapping[str, str]) -> dict[str, Series]:
    """Return columns as lines over steps; columns that the file lacks are left out."""
    return {name: Series(columns["step"], columns[key]) for name, key in columns_of_lines.items() if key in columns}
