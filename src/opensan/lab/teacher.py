"""A small convolutional network that learns words from close-ups, and then is a target for a ViT's features.

A ViT of this size has to find out that neighbouring patches belong together; from captions alone it knows colours
after a hundred steps, but needs several thousand until it tells a heart from a circle. A convolutional network starts
with neighbourhoods and learns the same words from a tenth of the pictures. Its feature map, which has the grid of the
ViT's patches, is a target for every patch (FitNets; Romero et al., 2015). It is dropped after the training.

Letters: B batch, C channels, h w grid of stride 8.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensan.config import ImageConfig
from opensan.lab.scene_pictures import CLOSE_UPS, ScenePictures
from opensan.lab.scenes import COLOURS, SHAPES, TEXTURES, SceneRegion
from opensan.train.san import normalise

STRIDE = 8
CHANNELS = 160
_LAYERS = ((32, 5, 2), (32, 3, 1), (64, 3, 2), (64, 3, 1), (128, 3, 2), (CHANNELS, 3, 1))
"""(channels, kernel, stride) of each convolution."""

WORDS = (tuple(COLOURS), SHAPES, ("", *TEXTURES))
"""The attributes of an object in a caption: a colour, a shape, a texture or none."""


class Teacher(nn.Module):
    """Network that makes features [B, 160, h, w] of normalised pixels, and scores of the object's words."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out, kernel, stride in _LAYERS:
            convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
            layers += [convolution, nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * channels, sum(map(len, WORDS)))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return word scores, [B, 3, H, W] -> [B, words]."""
        features = self.body(pixels)
        return self.head(torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1))


@dataclass(frozen=True)
class WordBatch:
    """Close-ups and the words of their captions."""

    images: Tensor
    """[B, 3, H, W] uint8."""
    words: Tensor
    """[B, 3] int64: index of the colour, of the shape, of the texture."""

    def to(self, device: torch.device) -> "WordBatch":
        return WordBatch(self.images.to(device), self.words.to(device))


class CloseUpWords:
    """Close-ups with the words of their object (a `TrainingSource`)."""

    def __init__(self, seed: int, count: int) -> None:
        self.pictures = ScenePictures(seed, count, CLOSE_UPS, STRIDE)

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, index: int) -> str:
        return self.pictures.name(index)

    def load(self, index: int, generator: np.random.Generator) -> tuple[np.ndarray, tuple[int, ...]]:
        scene = self.pictures.scene(index)
        image, *_ = self.pictures.look_at(scene, generator)
        return image, words_of(scene.objects[0])

    @staticmethod
    def collate(samples: list[tuple[np.ndarray, tuple[int, ...]]]) -> WordBatch:
        images, words = zip(*samples, strict=True)
        return WordBatch(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(words))


def words_of(region: SceneRegion) -> tuple[int, ...]:
    """Return the indices of the object's words in WORDS."""
    attributes = (region.colour, region.shape, region.texture)
    return tuple(words.index(word) for words, word in zip(WORDS, attributes, strict=True))


class TeacherTask(nn.Module):
    """Cross-entropy loss of the colour, the shape and the texture."""

    def __init__(self, teacher: Teacher, image: ImageConfig) -> None:
        super().__init__()
        self.teacher = teacher
        self.image = image

    def prepare(self, batches: Sequence[WordBatch]) -> None:
        """Return nothing: the micro-batches of a step share no value."""

    def forward(self, batch: WordBatch, prepared: None) -> dict[str, Tensor]:
        scores = self.teacher(normalise(batch.images, self.image)).split([len(words) for words in WORDS], dim=1)
        kinds = ("colour", "shape", "texture")
        return {
            f"loss_{kind}": F.cross_entropy(score, batch.words[:, column])
            for column, (kind, score) in enumerate(zip(kinds, scores, strict=True))
        }


@torch.no_grad()
def settle(teacher: Teacher, pixels: Tensor) -> None:
    """Measure the batch norms' statistics on normalised `pixels`: a checkpoint holds parameters only, not these."""
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # plain averages
    teacher.train()
    for batch in pixels.split(100):
        teacher(batch)
    teacher.eval()


class Imitation(nn.Module):
    """Mean squared error between the teacher's features and a linear map of the ViT's patch tokens."""

    def __init__(self, teacher: Teacher, width: int, pixels: Tensor) -> None:
        """`teacher` is frozen; `width` is that of the tokens; `pixels` [B, 3, H, W], normalised, give the scale."""
        super().__init__()
        self._teacher = [teacher.eval().requires_grad_(False)]  # in a list: a submodule would be trained and saved
        self.map = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CHANNELS))
        with torch.no_grad():
            features = teacher.body(pixels)
        self.register_buffer("mean", features.mean(dim=(0, 2, 3)))
        self.register_buffer("std", features.std(dim=(0, 2, 3)) + 0.1)

    def forward(self, patch_tokens: Tensor, pixels: Tensor) -> Tensor:
        """`patch_tokens` [B, h * w, width] of normalised `pixels` -> a scalar, about 1 for an untrained ViT."""
        with torch.no_grad():
            features = self._teacher[0].body(pixels).flatten(2).transpose(1, 2)
        return F.mse_loss(self.map(patch_tokens), (features - self.mean) / self.std)


@torch.inference_mode()
def word_accuracy(teacher: Teacher, image: ImageConfig, count: int = 400, seed: int = 98) -> dict[str, float]:
    """Return the share of right colours, shapes and textures on close-ups that no training draws."""
    source = CloseUpWords(seed, count)
    generator = np.random.default_rng(seed)
    batch = source.collate([source.load(index, generator) for index in range(count)])
    scores = teacher.eval()(normalise(batch.images, image)).split([len(words) for words in WORDS], dim=1)
    return {
        f"accuracy_{kind}": float((score.argmax(dim=1) == batch.words[:, column]).float().mean())
        for column, (kind, score) in enumerate(zip(("colour", "shape", "texture"), scores, strict=True))
    }
