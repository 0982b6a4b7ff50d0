"""The row with the highest product, with and without the product."""

import pytest
import torch

from opensan.assemble.best_row import best_row

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (3, 10, 127), (65, 100, 129), (847, 100, 1000)])
def test_no_other_row_is_better(device, rows, inner, columns):
    generator = torch.Generator().manual_seed(rows)
    weights = torch.rand(rows, inner, generator=generator).to(device)
    values = torch.rand(inner, columns, generator=generator).to(device)
    scores = weights.double() @ values.double()
    chosen = scores.gather(0, best_row(weights, values).unsqueeze(0)).squeeze(0)
    assert (scores.amax(0) - chosen).max() < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_ties_go_to_the_lowest_row(device):
    weights = torch.tensor([[0.25, 0.5], [0.5, 0.25], [0.25, 0.5], [0.5, 0.25]], device=device)
    values = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], device=device)
    assert best_row(weights, values).tolist() == [1, 0, 0]
