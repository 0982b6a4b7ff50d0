"""The text tower of `photo`: it reads a word in a sentence and answers the word's point in the shared space.

Letters: P prompts, T tokens, D embedding.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensan.config import TextConfig
from opensan.lab.photo.words import Lexicon, WordPoints
from opensan.model.backbones.text_tower import TextTower
from opensan.text.encoder import pad_tokens, tokenize
from opensan.train.config import LoopConfig
from opensan.train.loop import Trainer
from opensan.train.optimizer import ParameterGroup
from opensan.vocabulary import TEMPLATE_SETS

LOOP = LoopConfig(
    steps=1_500,
    batch_size=192,
    learning_rate=2e-3,
    warmup=50,
    clip_norm=1.0,
    save_every=100,
    log_every=50,
)

TEMPLATES = ("{}", *TEMPLATE_SETS["vild"])
OFTEN = 4
"""Times in an epoch that a word of the labelled sets comes; others once, and with each of their other names."""
SCALE = 20.0
"""Factor of the cosines, in the choice among all words."""


@dataclass(frozen=True)
class Prompts:
    """A batch of sentences."""

    tokens: Tensor
    """[P, T] int64, numbered by their place in `Sentences.tokens`."""
    words: Tensor
    """[P] int64: the word that each sentence is about."""

    def to(self, device: torch.device) -> "Prompts":
        """Return the same on `device`."""
        return Prompts(self.tokens.to(device), self.words.to(device))


class Sentences:
    """Words and their other names, each in a random sentence (a `TrainingSource`)."""

    def __init__(self, words: Lexicon, often: Collection[str]) -> None:
        """`often`: words that come several times in an epoch."""
        weights = [OFTEN if word in often else 1 for word in words.words]
        self.texts: list[tuple[int, str]] = []
        for number, word in enumerate(words.words):
            others = [(number, other) for other in words.names[number]]
            self.texts += ([(number, word)] * 3 + others) * weights[number]
        self.tokens = self._seen_tokens()
        """Every token that training reads, in order, so that the end of text stays the largest."""
        self._place = {token: index for index, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.texts)

    def name(self, index: int) -> str:
        return self.texts[index][1]

    def load(self, index: int, generator: np.random.Generator) -> tuple[list[int], int]:
        number, text = self.texts[index]
        template = TEMPLATES[int(generator.integers(len(TEMPLATES)))]
        return tokenize(template.replace("{}", text)), number

    def collate(self, samples: list[tuple[list[int], int]]) -> Prompts:
        prompts, words = zip(*samples, strict=True)
        compact = [[self._place[token] for token in prompt] for prompt in prompts]
        return Prompts(pad_tokens(compact), torch.tensor(words))

    def _seen_tokens(self) -> list[int]:
        texts = {text for _, text in self.texts}
        return sorted(
            {token for text in texts for template in TEMPLATES for token in tokenize(template.replace("{}", text))}
        )


class TextTask(nn.Module):
    """Each sentence's point near its word's, and nearer than to all other words'."""

    points: Tensor

    def __init__(self, tower: TextTower, points: Tensor) -> None:
        """Hold the tower and the words' points [words, D], unit length."""
        super().__init__()
        self.tower = tower
        self.register_buffer("points", points, persistent=False)

    def prepare(self, batches: Sequence[Prompts]) -> None:
        """Share nothing between the micro-batches of a step."""

    def forward(self, batch: Prompts, prepared: None) -> dict[str, Tensor]:
        rows = self.tower.embed_prompts(batch.tokens)
        cosines = rows @ self.points.T
        near = 1 - cosines.gather(1, batch.words[:, None]).mean()
        return {"loss_near": 5 * near, "loss_choice": F.cross_entropy(SCALE * cosines, batch.words)}


def train_text(
    points: WordPoints, config: TextConfig, often: Collection[str], out: Path, loop: LoopConfig = LOOP
) -> dict[str, Tensor] | None:
    """Train a tower on the words' points; its state, or None when a signal stopped it. Resumes.

    The tokens that no sentence has stay exactly zero in the table, by which a model knows words that it never read.
    """
    sentences = Sentences(points.lexicon, often)
    compact = config.model_copy(update={"vocab_size": len(sentences.tokens)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = TextTower(compact, points.table.shape[1], nn.GELU)
    names, parameters = zip(*tower.named_parameters(), strict=True)
    groups = [ParameterGroup(names, parameters, loop.learning_rate, 0.0)]
    if not Trainer(TextTask(tower, points.table), sentences, groups, loop, out).run().finished:
        return None
    state = {name: tensor.detach().clone() for name, tensor in tower.state_dict().items()}
    table = torch.zeros(config.vocab_size, config.width)
    table[sentences.tokens] = state["token_embedding.weight"]
    return state | {"token_embedding.weight": table}
