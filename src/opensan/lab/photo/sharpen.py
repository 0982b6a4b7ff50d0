"""Sharpen the masks of the trained side adapter: their logits times FACTOR plus OFFSET, written into the weights.

A label is the word with the highest sum, over all proposals, of class times mask probability. Masks that were trained
one by one have wide, soft edges; many proposals of ground lie around each small thing, and their edges together
outvote it. Sharper masks let a pixel be named by the proposals that cover it. FACTOR and OFFSET were chosen on
photographs that no training saw. Recognition looks where it looked before: its bias has a path of its own.

Letters: Q queries, M mask channels.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from opensan.checkpoints import save_folder
from opensan.images import prepare
from opensan.lab.photo.sets import PhotoSet
from opensan.model import SAN
from opensan.model.side_adapter import DecoupledHead

FACTOR = 2.0
OFFSET = -2.0
OF_SETS = ("coco_small", "coco_stuff", "pets", "people", "facades", "campus", "library")
PHOTOGRAPHS = 8
"""Training photographs of each set, evenly spread, whose queries tell how to add a constant."""


@torch.no_grad()
def queries_of(model: SAN, root: Path) -> Tensor:
    """Return the vectors of queries that mask logits are products of, of training photographs: [n, M]."""
    head = model.side_adapter.head
    assert isinstance(head, DecoupledHead) and head.pixel_mlp is not head.attention_mlp
    seen: list[Tensor] = []
    with head.query_mlp.register_forward_hook(lambda _module, _inputs, answer: seen.append(answer[0])):
        for name in OF_SETS:
            dataset = PhotoSet(root, name, "train", masks_of_novel=False)
            for step in range(PHOTOGRAPHS):
                image, _ = dataset[step * len(dataset) // PHOTOGRAPHS]
                model.propose(torch.as_tensor(prepare(image, model.config.image).pixels)[None])
    return torch.cat(seen)


@torch.no_grad()
def sharpen(model: SAN, queries: Tensor, factor: float = FACTOR, offset: float = OFFSET) -> float:
    """Change the last layer of the pixels' path in place.

    A mask logit is the product of a query's and a pixel's vector. So the constant is a vector whose product with every
    query is nearly `offset`, by least squares over `queries` [n, M]. Returns the root mean square of what is missed.
    """
    head = model.side_adapter.head
    assert isinstance(head, DecoupledHead)
    wanted = torch.full((len(queries),), offset, dtype=torch.float64)
    constant = torch.linalg.lstsq(queries.double(), wanted[:, None], driver="gelsd").solution[:, 0]
    last = head.pixel_mlp.layers[-1]
    assert isinstance(last, nn.Linear)
    last.weight.mul_(factor)
    last.bias.mul_(factor).add_(constant.to(last.bias.dtype))
    return float((queries.double() @ constant - wanted).square().mean().sqrt())


def sharpen_step(model: SAN, root: Path, out: Path) -> None:
    """Sharpen the masks of `model`, in place, and write `out`/model in half precision."""
    missed = sharpen(model, queries_of(model, root))
    print(f"mask logits times {FACTOR:g} plus {OFFSET:g}, within {missed:.3f} (root mean square)", flush=True)
    save_folder(model, out / "model", torch.float16)
