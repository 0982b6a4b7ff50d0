"""Split the model into the modules that are exported, each of tensors alone, with example inputs.

Letters: B batch, Q queries, K words, R text rows, D embedding, H W image, h w mask grid, H0 W0 the answer,
N nodes of a prompt tree, P prompts, S rows of the word that has most.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from opensan.assemble.scores import class_probabilities
from opensan.checkpoints import build_empty
from opensan.config import ModelConfig
from opensan.errors import UserError
from opensan.model import SAN
from opensan.model.maps import WIDEST_WINDOW
from opensan.structures import PromptTree, Proposals, TextClassifier

LARGEST_SIDE = 4096
"""Sides in pixels of the network image up to which an exported graph's fixed pooling steps suffice."""


class ImageGraph(nn.Module):
    """pixels [B, 3, H, W] -> mask logits [B, Q, h, w], mask embeddings [B, Q, D]."""

    def __init__(self, model: SAN) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        # A slice that leaves nothing out: all sizes become multiples of one symbol, which takes seconds to trace.
        divisor = self.model.image_config.size_divisor
        height, width = (side // divisor * divisor for side in pixels.shape[2:])
        proposals = self.model.propose(pixels[:, :, :height, :width])
        return proposals.mask_logits, proposals.mask_embeddings


class WordGraph(nn.Module):
    """Mask embeddings [Q, D], text rows [R, D] and each word's rows [K, S] -> class probabilities [Q, K].

    A word with fewer rows than S repeats one: the best of its rows is its logit.
    """

    def __init__(self, model: SAN) -> None:
        super().__init__()
        self.model = model

    def forward(self, mask_embeddings: Tensor, rows: Tensor, rows_of_word: Tensor) -> Tensor:
        proposals = Proposals(mask_logits=mask_embeddings, mask_embeddings=mask_embeddings.unsqueeze(0))
        one_class_a_row = TextClassifier(rows, rows_of_word, rows.shape[0])
        logits = self.model.classify(proposals, one_class_a_row)[0]
        words = logits[:, :-1][:, rows_of_word].amax(dim=2)
        return class_probabilities(torch.cat([words, logits[:, -1:]], dim=1))


class LabelGraph(nn.Module):
    """Label a band of rows: labels and their scores, both [rows, W0], from class probabilities [Q, K].

    `down` [rows, h] and `across` [W0, w] resize the mask logits [Q, h, w]; scores may exceed 1.
    """

    def forward(self, probabilities: Tensor, mask_logits: Tensor, down: Tensor, across: Tensor) -> tuple[Tensor, ...]:
        masks = (down @ mask_logits @ across.T).sigmoid()
        scores = probabilities.T @ masks.flatten(1)
        labels = scores.argmax(dim=0).to(torch.int32)
        return labels.view(masks.shape[1:]), scores.amax(dim=0).view(masks.shape[1:])


class TextGraph(nn.Module):
    """A prompt tree (tokens [N], depth [N], sees [N, N], ends [P]) -> unit text embeddings [P, D]."""

    def __init__(self, model: SAN) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, depth: Tensor, sees: Tensor, ends: Tensor) -> Tensor:
        return self.model.embed_prompt_tree(PromptTree(tokens, depth, sees, ends))


class PromptGraph(nn.Module):
    """Padded prompts (tokens [P, T]) -> unit text embeddings [P, D]; for towers that are not causal."""

    def __init__(self, model: SAN) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.embed_prompts(tokens)


@dataclass(frozen=True)
class Graph:
    """One module to export, with its inputs and outputs."""

    module: nn.Module
    example: dict[str, Tensor]
    """Input name -> an example; no dimension that may change is 1, because tracing would fix it."""
    dynamic: dict[str, tuple[int, ...]]
    """Input name -> the dimensions that may change."""
    outputs: tuple[str, ...]

    def program(self) -> ExportedProgram:
        """Trace the module with torch.export. Gradients are off: with them, attention is another operation."""
        shapes = {name: {dim: Dim.DYNAMIC for dim in dims} for name, dims in self.dynamic.items()}
        with torch.no_grad():
            return torch.export.export(self.module, tuple(self.example.values()), dynamic_shapes=shapes, strict=False)


def graphs(model: SAN, *, text: bool) -> dict[str, Graph]:
    """Return name -> graph: "image", "words", "labels", and "text" if wanted. `model` is in evaluation mode.

    Raises UserError if a graph for all sizes cannot hold this model.
    """
    config = model.config
    _check_windows(config)
    divisor, queries, dimension = config.image.size_divisor, config.side_adapter.queries, config.clip.embed_dim
    pieces = {
        "image": Graph(
            ImageGraph(model),
            {"pixels": torch.zeros(2, 3, 3 * divisor, 4 * divisor)},
            {"pixels": (0, 2, 3)},
            ("mask_logits", "mask_embeddings"),
        ),
        "words": Graph(
            WordGraph(model),
            {
                "mask_embeddings": torch.zeros(queries, dimension),
                "rows": torch.zeros(7, dimension),
                "rows_of_word": torch.zeros(5, 2, dtype=torch.int64),
            },
            {"mask_embeddings": (), "rows": (0,), "rows_of_word": (0, 1)},
            ("probabilities",),
        ),
        "labels": Graph(
            LabelGraph(),
            {
                "probabilities": torch.zeros(queries, 5),
                "mask_logits": torch.zeros(queries, 6, 8),
                "down": torch.zeros(9, 6),
                "across": torch.zeros(11, 8),
            },
            {"probabilities": (1,), "mask_logits": (1, 2), "down": (0, 1), "across": (0, 1)},
            ("labels", "scores"),
        ),
    }
    if text:
        pieces["text"] = _text_graph(model)
    return pieces


def _text_graph(model: SAN) -> Graph:
    text = model.config.clip.text
    if text.causal:
        return Graph(
            TextGraph(model),
            {
                "tokens": torch.zeros(5, dtype=torch.int64),
                "depth": torch.arange(5),
                "sees": torch.ones(5, 5, dtype=torch.bool).tril(),
                "ends": torch.tensor([2, 3, 4]),
            },
            {"tokens": (0,), "depth": (0,), "sees": (0, 1), "ends": (0,)},
            ("embeddings",),
        )
    length = 5 if text.padding is None else text.context_length
    tokens = torch.ones(3, length, dtype=torch.int64)
    return Graph(
        PromptGraph(model),
        {"tokens": tokens},
        {"tokens": (0, 1) if text.padding is None else (0,)},
        ("embeddings",),
    )


def _check_windows(config: ModelConfig) -> None:
    """Raise UserError if the attention bias is pooled from wider windows than an exported graph supports."""
    if config.recognition != "bias" or config.recognition_scale is not None:
        raise UserError(
            f"{config.name}: only models that recognise by a bias, in one forward pass, are exported, so far"
        )
    divisor, empty = config.image.size_divisor, build_empty(config)
    # Rounding makes windows wide on small images; of larger ones, only the ratio of both grids counts.
    for side in (*range(divisor, 9 * divisor, divisor), LARGEST_SIDE // divisor * divisor):
        whole = side // config.side_adapter.patch_size
        with torch.no_grad():
            size = empty.shallow_features(torch.empty(1, 3, divisor, side, device="meta")).grid[1]
        widest = max(-(-(column + 1) * whole // size) - column * whole // size for column in range(size))
        if widest > WIDEST_WINDOW:
            raise UserError(
                f"{config.name}: its side network's grid is {whole / size:.1f} times as fine as its encoder's, "
                f"and an exported model's may be {WIDEST_WINDOW - 1} times as fine at most"
            )
