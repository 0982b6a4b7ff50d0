"""The CUDA kernel of `best_row`, in Triton, which every CUDA build of torch includes. Imported when used."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 128
_ROWS = 32
_WARPS = 4


def best_row_on_cuda(high: Tensor, low: Tensor, columns: Tensor) -> Tensor:
    """Return [P] int64: the row of high + low [K, Q], float16, with the highest product at each of `columns` [Q, P].

    Q is a power of two of 16 or more in `high` and `low`; `columns` may have fewer rows.
    """
    inner, count = columns.shape
    best = torch.empty(count, dtype=torch.int64, device=columns.device)
    grid = (triton.cdiv(count, _COLUMNS),)
    rows, size = high.shape
    _kernel[grid](high, low, columns, best, rows, inner, count, size, _ROWS, _COLUMNS, num_warps=_WARPS)
    return best


@triton.jit
def _kernel(
    high_pointer,
    low_pointer,
    columns_pointer,
    best_pointer,
    rows,
    inner,
    count,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Process COLUMNS columns, ROWS rows at a time, and keep the best row so far."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, SIZE)
    inside = (depth[:, None] < inner) & (column[None, :] < count)
    values = tl.load(columns_pointer + depth[:, None] * count + column[None, :], mask=inside, other=0.0)
    high = values.to(tl.float16)
    low = (values - high.to(tl.float32)).to(tl.float16)
    top = tl.full([COLUMNS], -1.0, tl.float32)
    best = tl.zeros([COLUMNS], tl.int32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        place = row[:, None] * SIZE + depth[None, :]
        known = row[:, None] < rows
        row_high = tl.load(high_pointer + place, mask=known, other=0.0)
        row_low = tl.load(low_pointer + place, mask=known, other=0.0)
        scores = tl.dot(row_high, low)
        scores = tl.dot(row_low, high, scores)
        scores = tl.dot(row_high, high, scores)
        scores = tl.where(known, scores, -1.0)
        found, index = tl.max(scores, axis=0, return_indices=True)  # ties: the lowest row
        better = found > top
        best = tl.where(better, first + index, best)
        top = tl.where(better, found, top)
    tl.store(best_pointer + column, best.to(tl.int64), mask=column < count)
