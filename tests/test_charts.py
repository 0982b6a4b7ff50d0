"""Curves and panels: the pictures that a run leaves."""

import math

import numpy as np
import pytest

from opensan.outputs.charts import HEIGHT, WIDTH, Series, charts
from opensan.outputs.colours import palette
from opensan.outputs.drawing import OPACITY, muted
from opensan.outputs.panel import GAP, LINE, TILE, PanelRow, panel
from opensan.train.log import summary


def coloured(picture, colour) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels near `colour`."""
    distance = np.abs(np.asarray(picture).astype(int) - np.array(colour)).sum(-1)
    return np.nonzero(distance < 40)


def test_a_rising_line_rises_and_what_is_not_finite_is_left_out():
    x = list(range(20))
    picture = charts({"loss": {"loss": Series(x, [float(value) for value in x])}})
    assert picture.size == (WIDTH, HEIGHT)
    rows, columns = coloured(picture, palette(1)[0])
    assert rows[columns == columns.min()].mean() > rows[columns == columns.max()].mean() + HEIGHT / 3
    broken = charts({"loss": {"loss": Series([*x, 99], [*map(float, x), math.nan])}})
    assert np.array_equal(np.asarray(broken), np.asarray(picture))


def test_smoothing_is_a_mean_of_neighbours():
    smooth = Series(range(200), [float(value % 2) for value in range(200)]).smoothed()
    assert smooth.y[100] == pytest.approx(2 / 5, abs=0.2 + 1e-9)
    assert max(smooth.y[10:190]) - min(smooth.y[10:190]) < 0.21


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 0.0], [1e-9, 3e8], [-5.0, -4.0], [math.inf], []])
def test_any_values_can_be_drawn(values):
    charts({"loss": {"loss": Series(range(len(values)), values)}, "other": {}})


def test_charts_stand_in_a_grid():
    one = {"y": Series([0, 1], [0.0, 1.0])}
    assert charts({str(number): one for number in range(3)}).size == (2 * WIDTH, 2 * HEIGHT)


def test_a_panel_shows_image_truth_prediction_and_mistakes_side_by_side():
    image = np.full((30, 60, 3), 100, dtype=np.uint8)
    truth, predicted = np.zeros((30, 60), dtype=np.int16), np.ones((30, 60), dtype=np.int32)
    picture = np.asarray(panel([PanelRow("street", image, truth, predicted)], ["road", "sky"]))
    middle = LINE + TILE // 4
    shown = [picture[middle, GAP + column * (TILE + GAP) + TILE // 2].astype(float) for column in range(4)]
    grey, dim = (muted(np.full((1, 1, 3), value, np.uint8))[0, 0] for value in (100, muted(image)[0, 0]))
    behind = [grey, grey, dim]  # mistakes lie on the image that is muted twice
    mixed = [
        under * (1 - OPACITY) + palette(2)[index] * OPACITY for under, index in zip(behind, (0, 1, 1), strict=True)
    ]
    for found, expected in zip(shown, [np.full(3, 100.0), *mixed], strict=True):
        assert np.abs(found - expected).max() < 4
    for colour in palette(2):  # both words are in the legend
        assert len(coloured(picture[LINE + TILE // 2 + LINE :], colour)[0]) > 50


def test_a_panel_of_photographs_of_any_shape_without_labels():
    rows = [
        PanelRow(f"photograph {height}", np.zeros((height, width, 3), np.uint8), *[np.full((height, width), -1)] * 2)
        for height, width in ((500, 20), (20, 900), (1, 1))
    ]
    assert panel(rows, ["road"]).height > TILE


def test_the_line_of_a_step_has_what_one_watches():
    figures = {"learning_rate": 1e-4, "loss": 12.5, "loss_ce": 2.0, "loss_mask": 1.5, "loss_ce_0": 9.0}
    figures |= {"samples_per_second": 3.25, "waiting_for_data": 0.1, "peak_memory_mib": math.nan}
    assert summary(figures) == "loss 12.5, ce 2 mask 1.5, lr 1.00e-04, 3.25 samples/s, waiting 10%"
    assert summary({"loss_square": 1.0}) == "square 1"
