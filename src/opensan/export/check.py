"""Check that exported graphs give the results of the model, on several images and vocabularies.

Letters: K words.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from opensan.assemble.interpolation import interpolation_matrices
from opensan.assemble.labels import label_map
from opensan.assemble.scores import class_probabilities
from opensan.config import ModelConfig
from opensan.files import ASSETS
from opensan.images import PreparedImage, prepare
from opensan.model import SAN
from opensan.segmenters.exported.runtimes import Run
from opensan.structures import Proposals, TextClassifier
from opensan.text.encoder import TextEncoder
from opensan.text.prompt_tree import prompt_trees
from opensan.vocabulary import Vocabulary

SCENE = ASSETS / "scenes" / "playground.png"
SHAPES = ((1, 1), (3, 4), (3, 2), (1, 3))
"""Height to width of the test images, which are cut from a scene."""
WORD_COUNTS = (2, 7, 171)
"""Vocabulary sizes in the check, at most: a small model may distinguish fewer words."""
MOST_ALIKE = 0.99
"""Largest cosine between the text embeddings of two words that count as different."""


@dataclass(frozen=True)
class Tolerances:
    """Largest allowed differences between an export and its model."""

    difference: float
    """Largest difference of a tensor from the model's, as a share of the latter's largest magnitude."""
    agreement: float
    """Smallest share of equal labels."""


LIMITS = {
    "float32": Tolerances(1e-4, 0.999),
    "float16": Tolerances(0.02, 0.98),
    "bfloat16": Tolerances(0.5, 0.9),
    "int8": Tolerances(0.5, 0.9),
}
"""Limits by dtype. bfloat16 and int8 are judged by their labels; their tensors only by order of magnitude."""


@dataclass(frozen=True)
class Parity:
    """Result of the check."""

    differences: dict[str, float]
    """Tensor -> largest difference, as in `Tolerances`."""
    agreement: float
    """Share of equal labels over all images and vocabularies."""
    limits: Tolerances

    @property
    def passed(self) -> bool:
        """Whether all differences are within the limits; False if any is not a number."""
        fits = all(value <= self.limits.difference for value in self.differences.values())
        return fits and self.agreement >= self.limits.agreement


@torch.inference_mode()
def parity(model: SAN, graphs: Mapping[str, Run], dtype: str) -> Parity:
    """Compare exported `graphs` (name -> function) with `model`."""
    differences: dict[str, float] = defaultdict(float)

    def compare(name: str, result: np.ndarray, expected: torch.Tensor) -> None:
        difference = np.abs(result - expected.numpy()).max() / max(1e-9, expected.abs().max().item())
        differences[name] = float(np.fmax(differences[name], np.nan_to_num(difference, nan=np.inf)))

    inputs, rows = _embedded_prompts(model)
    if "text" in graphs:
        compare("text embeddings", graphs["text"](**inputs)[0], rows)
    rows = _distinct(rows)
    equal = total = 0
    for prepared in _images(model.config):
        proposals = model.propose(torch.as_tensor(prepared.pixels).unsqueeze(0))
        masks, embeddings = graphs["image"](pixels=torch.as_tensor(prepared.pixels).unsqueeze(0).numpy())
        compare("mask logits", masks, proposals.mask_logits)
        compare("mask embeddings", embeddings, proposals.mask_embeddings)
        for count in WORD_COUNTS:
            expected = _probabilities(model, proposals, rows[:count])
            probabilities = _exported_probabilities(graphs, embeddings[0], rows[:count].numpy())
            compare("class probabilities", probabilities, expected)
            down, across = interpolation_matrices(masks.shape[-2:], prepared.sizes)
            labels, _ = graphs["labels"](probabilities=probabilities, mask_logits=masks[0], down=down, across=across)
            truth = label_map(proposals.mask_logits[0], expected, prepared.sizes).numpy()
            equal, total = equal + int((labels == truth).sum()), total + truth.size
    return Parity(dict(differences), equal / total, LIMITS[dtype])


def _embedded_prompts(model: SAN) -> tuple[dict[str, np.ndarray], torch.Tensor]:
    """Return the inputs of the text graph for a sentence with each of 171 words, and the model's rows, [P, D]."""
    encoder = TextEncoder(model, disk_cache=False)
    encoder.tower()  # opens the model's own tokenizer, if it has one
    names = Vocabulary.ready("coco_stuff_171").names
    prompts = sorted({tuple(encoder.tokenize(f"a photo of a {name}.")) for name in names})
    if encoder.causal:
        tree = next(prompt_trees(prompts, most_nodes=100_000))
        parts = {"tokens": tree.tokens, "depth": tree.depth, "sees": tree.sees, "ends": tree.ends}
        return {name: np.asarray(part) for name, part in parts.items()}, model.embed_prompt_tree(tree.to("cpu"))
    tokens = encoder.padded(prompts)
    return {"tokens": tokens}, model.embed_prompts(torch.from_numpy(tokens))


def _distinct(rows: torch.Tensor) -> torch.Tensor:
    """Drop rows like an earlier row: rounding decides between words that a small model can't distinguish."""
    return rows[(rows @ rows.T).triu(diagonal=1).amax(dim=0) < MOST_ALIKE]


def _images(config: ModelConfig) -> Iterator[PreparedImage]:
    """Return prepared images of all `SHAPES`, smaller than the model's usual size to keep the check quick."""
    short = max(config.image.size_divisor, config.image.short_side // 2)
    small = config.image.model_copy(update={"short_side": short})
    with Image.open(SCENE) as picture:
        scene = picture.convert("RGB")
    for height, width in SHAPES:
        size = min(scene.height // height, scene.width // width)
        cut = scene.crop((0, 0, width * size, height * size))
        yield prepare(np.array(cut), small)


def _probabilities(model: SAN, proposals: Proposals, rows: torch.Tensor) -> torch.Tensor:
    text = TextClassifier(rows, torch.arange(len(rows)), len(rows))
    return class_probabilities(model.classify(proposals, text))[0]


def _exported_probabilities(graphs: Mapping[str, Run], embeddings: np.ndarray, rows: np.ndarray) -> np.ndarray:
    rows_of_word = np.arange(len(rows))[:, None]
    (probabilities,) = graphs["words"](mask_embeddings=embeddings, rows=rows, rows_of_word=rows_of_word)
    return probabilities
