"""Find the row with the highest product at every column; on CUDA without storing the product.

Letters: K rows (words), Q inner dimension (queries), P columns (pixels).
"""

from importlib.util import find_spec

import torch.nn.functional as F
from torch import Tensor


def best_row(weights: Tensor, columns: Tensor) -> Tensor:
    """Return (weights @ columns).argmax(0), [P] int64, of weights [K, Q] and columns [Q, P], float32 in [0, 1].

    On CUDA each number is split in two of half precision. Of their four products the three that matter are summed, so
    22 bits are kept where float32 keeps 24, and the tensor cores do the work.
    """
    if not (columns.is_cuda and find_spec("triton")):
        return (weights @ columns).max(dim=0).indices
    from opensan.assemble.best_row_kernel import best_row_on_cuda

    queries = weights.shape[1]
    padded = F.pad(weights, (0, max(16, 1 << (queries - 1).bit_length()) - queries))
    high = padded.half()
    return best_row_on_cuda(high, (padded - high.float()).half(), columns.contiguous())
