"""A small CLIP learns pictures and captions by contrast (Radford et al., 2021): the frozen heart of a small SAN.

    python -m opensan.lab.clip_training --out runs/lab-clip

Letters: B batch, L tokens, D embedding.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opensan.config import ClipConfig, Config, ImageConfig, TextConfig, VisionConfig, parse_config
from opensan.files import atomic_path, write_text
from opensan.lab.captions import caption, lexicon, wrong_caption
from opensan.lab.scenes import COLOURS, SEGMENTATION_NAMES, SHAPES, Region, make_scene, novel_kind
from opensan.model.clip import build_clip, encode_prompts, shallow_features
from opensan.text import pad_tokens, tokenize
from opensan.train.config import LoopConfig
from opensan.train.loop import Trainer
from opensan.train.optimizer import ParameterGroup
from opensan.train.san import normalise

LAB_CLIP = ClipConfig(
    embed_dim=128,
    quick_gelu=False,
    vision=VisionConfig(width=128, layers=6, heads=4, patch_size=8, image_size=96),
    text=TextConfig(width=64, layers=3, heads=4),
)
"""About 4.7 million numbers, two thirds of them the token table."""

HIGHEST_SCALE = 100.0
"""Limit of the learned logit scale, as CLIP's."""


@dataclass(frozen=True)
class CaptionBatch:
    """Pictures and what is said of them."""

    images: Tensor
    """[B, 3, H, W] uint8 RGB."""
    tokens: Tensor
    """[B, L] int64."""
    wrong_tokens: Tensor | None
    """[B, L'] int64: a false sentence for each picture, if the data has them."""

    def to(self, device: torch.device) -> "CaptionBatch":
        wrong = None if self.wrong_tokens is None else self.wrong_tokens.to(device)
        return CaptionBatch(self.images.to(device), self.tokens.to(device), wrong)


def collate_captions(samples: list[tuple[np.ndarray, str, str | None]]) -> CaptionBatch:
    """Pictures [H, W, 3] of one size, captions, and false captions (or None for all)."""
    images, captions, wrong = zip(*samples, strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    wrong_tokens = None if wrong[0] is None else pad_tokens([_tokens(text) for text in wrong])
    return CaptionBatch(pixels, pad_tokens([_tokens(text) for text in captions]), wrong_tokens)


@functools.lru_cache(maxsize=200_000)
def _tokens(text: str) -> tuple[int, ...]:
    """Cut to what CLIP reads, end of text kept: captions of strangers may be long."""
    tokens = tokenize(text)
    return tuple(tokens if len(tokens) <= 77 else [*tokens[:76], tokens[-1]])


class SceneCaptions:
    """Crops of lab scenes with captions of what they show (a `TrainingSource`). Scenes are drawn once and kept."""

    def __init__(
        self,
        seed: int,
        scenes: int,
        *,
        crop: int,
        scene_side: int,
        objects: tuple[int, int],
        radius: tuple[float, float],
    ) -> None:
        """Square scenes of `scene_side` pixels (`objects`, `radius`: see `make_scene`), seen through `crop` pixels."""
        self.scenes = scenes
        self.crop = crop
        self.scene_side = scene_side
        self._scene = functools.cache(
            lambda index: make_scene(seed, index, (scene_side, scene_side), objects=objects, radius=radius)
        )

    def __len__(self) -> int:
        return self.scenes

    def name(self, index: int) -> str:
        return f"scene {index}"

    def load(self, index: int, generator: np.random.Generator) -> tuple[np.ndarray, str, str]:
        scene = self._scene(index)
        top, left = self._corner(scene.objects, generator)
        window = slice(top, top + self.crop), slice(left, left + self.crop)
        image, seen = scene.image[window], scene.index_map[window]
        if generator.random() < 0.5:
            image = image[:, ::-1]
        regions = _regions_in(scene.regions, scene.index_map, seen)
        return np.ascontiguousarray(image), caption(regions, generator), wrong_caption(regions, generator)

    def _corner(self, objects: Sequence[Region], generator: np.random.Generator) -> tuple[int, int]:
        """Mostly around an object, off its centre; sometimes anywhere."""
        room = self.scene_side - self.crop
        if room == 0:
            return 0, 0
        if not objects or generator.random() < 0.15:
            y, x = generator.integers(0, room + 1, 2)
            return int(y), int(x)
        centre = objects[int(generator.integers(len(objects)))].centre
        y, x = (round(c - self.crop / 2 + generator.uniform(-0.2, 0.2) * self.crop) for c in centre)
        return min(max(y, 0), room), min(max(x, 0), room)

    collate = staticmethod(collate_captions)


def _regions_in(regions: Sequence[Region], whole: np.ndarray, seen: np.ndarray) -> list[Region]:
    """What a caption of the window may name: objects mostly inside, grounds that cover a good part of it."""
    everywhere = np.bincount(whole.ravel(), minlength=len(regions))
    inside = np.bincount(seen.ravel(), minlength=len(regions))
    return [
        region
        for region, total, count in zip(regions, everywhere, inside, strict=True)
        if count > (0.15 * seen.size if region.ground else 0.6 * total)
    ] or [regions[int(inside.argmax())]]


class ClipTask(nn.Module):
    """Symmetric contrast within a batch; pairs with the same caption count as right, false captions as wrong."""

    def __init__(self, clip: CLIP, image: ImageConfig) -> None:
        super().__init__()
        self.clip = clip
        self.image = image

    def prepare(self, batches: Sequence[CaptionBatch]) -> None:
        """Nothing is shared between the micro-batches of a step."""

    def forward(self, batch: CaptionBatch, prepared: None) -> dict[str, Tensor]:
        images = embed_images(self.clip, normalise(batch.images, self.image))
        texts = encode_prompts(self.clip, batch.tokens)
        scale = self.clip.logit_scale.clamp(max=float(np.log(HIGHEST_SCALE))).exp()
        logits = scale * images @ texts.T
        same = (batch.tokens.unsqueeze(0) == batch.tokens.unsqueeze(1)).all(dim=2)
        wanted = same / same.sum(dim=1, keepdim=True)
        against = logits
        if batch.wrong_tokens is not None:
            wrong = scale * images @ encode_prompts(self.clip, batch.wrong_tokens).T
            against = torch.cat([logits, wrong], dim=1)
        to_texts = -(wanted * against.log_softmax(dim=1)[:, : len(logits)]).sum(dim=1).mean()
        to_images = -(wanted * logits.T.log_softmax(dim=1)).sum(dim=1).mean()
        return {"loss_to_texts": to_texts / 2, "loss_to_images": to_images / 2}


class WordTask(nn.Module):
    """The image tower alone says which words its caption holds (Joulin et al., 2016).

    A warm start: contrast alone learns colours at once, but stays for thousands of steps where neither tower can tell
    shapes apart and so neither gives the other a reason to.
    """

    def __init__(self, clip: CLIP, image: ImageConfig) -> None:
        super().__init__()
        self.clip = clip
        self.image = image
        self.words = sorted({token for text in lexicon() for token in tokenize(text)[1:-1]})
        self.head = nn.Linear(clip.visual.proj.shape[1], len(self.words))
        self.register_buffer("_place", torch.full((len(clip.token_embedding.weight),), -1))
        self._place[torch.tensor(self.words)] = torch.arange(len(self.words))

    def prepare(self, batches: Sequence[CaptionBatch]) -> None:
        """Nothing is shared between the micro-batches of a step."""

    def forward(self, batch: CaptionBatch, prepared: None) -> dict[str, Tensor]:
        scores = self.head(image_features(self.clip, normalise(batch.images, self.image)).float())
        places = self._place[batch.tokens]
        wanted = torch.zeros(len(scores), len(self.words) + 1)
        wanted.scatter_(1, places.where(places >= 0, len(self.words)), 1.0)
        return {"loss_words": F.binary_cross_entropy_with_logits(scores, wanted[:, :-1], reduction="sum") / len(scores)}


def image_features(clip: CLIP, pixels: Tensor) -> Tensor:
    """Image features [B, D], before they are normalised, of pixels [B, 3, H, W] of any size that patches fill."""
    visual = clip.visual
    features = shallow_features(visual, pixels, len(visual.transformer.resblocks), ())
    return visual.ln_post(features.tokens[:, 0]) @ visual.proj


def embed_images(clip: CLIP, pixels: Tensor) -> Tensor:
    """Unit image embeddings [B, D] of normalised pixels [B, 3, H, W]."""
    return F.normalize(image_features(clip, pixels).float(), dim=-1)


def clip_groups(clip: nn.Module, learning_rate: float, weight_decay: float) -> list[ParameterGroup]:
    """Matrices with weight decay; biases, norms, tables of positions and the scale without."""
    trained = [(name, p) for name, p in clip.named_parameters() if p.requires_grad]
    decayed = {name for name, p in trained if p.ndim > 1 and "positional" not in name}
    groups = []
    for decay in (weight_decay, 0.0):
        members = [(name, p) for name, p in trained if (name in decayed) == (decay > 0)]
        groups.append(ParameterGroup(*zip(*members, strict=True), learning_rate=learning_rate, weight_decay=decay))
    return groups


@functools.cache
def _probe_scenes(count: int = 600, seed: int = 99) -> tuple[Tensor, list[str]]:
    """Pictures [count, 3, 40, 40] of one object each, and their "colour shape" names."""
    kind = {"split": "test", "objects": (1, 1), "radius": (0.4, 0.45)}
    scenes = [make_scene(seed, index, (48, 48), **kind) for index in range(count)]
    pictures = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
    return pictures, [scene.objects[0].name for scene in scenes]


def _accuracies(found: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Share of right answers by kind of word, and of right colours and shapes."""
    right: dict[str, list[bool]] = {}
    for one, name in zip(found, names, strict=True):
        right.setdefault(novel_kind(name) or "base", []).append(one == name)
        right.setdefault("colour_alone", []).append(one.split()[0] == name.split()[0])
        right.setdefault("shape_alone", []).append(one.split()[-1] == name.split()[-1])
    return {f"accuracy_{kind}": float(np.mean(hits)) for kind, hits in sorted(right.items())}


@torch.inference_mode()
def probe(clip: CLIP) -> dict[str, float]:
    """Zero-shot accuracy on pictures of one object, among all words of the lab, by kind of word."""
    clip.eval()
    pictures, names = _probe_scenes()
    rows = encode_prompts(clip, pad_tokens([_tokens(f"a photo of a {name}.") for name in SEGMENTATION_NAMES]))
    best = (embed_images(clip, normalise(pictures, ImageConfig())) @ rows.T).argmax(dim=1).tolist()
    clip.train()
    return _accuracies([SEGMENTATION_NAMES[index] for index in best], names)


@torch.inference_mode()
def word_probe(task: WordTask) -> dict[str, float]:
    """The same for the words that the image tower alone names: its likeliest colour and shape."""
    pictures, names = _probe_scenes()
    scores = task.head(image_features(task.clip, normalise(pictures, ImageConfig())))

    def likeliest(words: Sequence[str]) -> list[str]:
        places = [task.words.index(tokenize(word)[1]) for word in words]
        return [words[index] for index in scores[:, places].argmax(dim=1).tolist()]

    pairs = zip(likeliest(tuple(COLOURS)), likeliest(SHAPES), strict=True)
    return _accuracies([f"{colour} {shape}" for colour, shape in pairs], names)


def forget_unseen_tokens(clip: CLIP, texts: Sequence[str]) -> None:
    """Set the embedding of every token that no caption holds to zero, so that a word never seen can be told."""
    seen = torch.zeros(len(clip.token_embedding.weight), dtype=torch.bool)
    for text in texts:
        seen[tokenize(text)] = True
    clip.token_embedding.weight.data[~seen] = 0


def save_clip(clip: CLIP, config: ClipConfig, folder: Path) -> None:
    """Write clip.safetensors and config.json, each all or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "clip.safetensors") as temporary:
        save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, temporary)
    write_text(folder / "config.json", config.model_dump_json(indent=2) + "\n")


def load_clip(folder: Path) -> tuple[CLIP, ClipConfig]:
    """Read what `save_clip` wrote."""
    config = parse_config(ClipConfig, _read_json(folder / "config.json"), str(folder / "config.json"))
    clip = build_clip(config)
    clip.load_state_dict(load_file(folder / "clip.safetensors"))
    return clip, config


def _read_json(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def _stage(steps: int, learning_rate: float, **others) -> LoopConfig:
    return LoopConfig(
        steps=steps,
        batch_size=128,
        learning_rate=learning_rate,
        weight_decay=0.05,
        warmup=100,
        clip_norm=1.0,
        save_every=200,
        log_every=50,
        **others,
    )


CLOSE = {"crop": 40, "scene_side": 64, "objects": (1, 1), "radius": (0.16, 0.38)}
WIDE = {"crop": 64, "scene_side": 96, "objects": (1, 5), "radius": (0.11, 0.24)}
WHOLE = {"crop": 96, "scene_side": 96, "objects": (1, 5), "radius": (0.11, 0.24)}


class LabClipConfig(Config):
    """The recipe: words of close-ups, then contrast on close-ups, on crops of scenes, and on whole scenes."""

    words: LoopConfig = _stage(1_600, 1e-3, validate_every=200)
    close: LoopConfig = _stage(1_000, 5e-4, seed=1, validate_every=250)
    wide: LoopConfig = _stage(800, 5e-4, seed=2, validate_every=200)
    whole: LoopConfig = _stage(500, 3e-4, seed=3, validate_every=100)
    pictures: int = 8_000
    """Scenes drawn for each kind of picture."""
    image: ImageConfig = ImageConfig()


def train_lab_clip(config: LabClipConfig, out: Path) -> CLIP:
    """Train from nothing; `out` holds the runs, and at the end clip.safetensors and config.json. Resumes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = build_clip(LAB_CLIP)
        tasks = {"words": WordTask(clip, config.image)}
    close, wide, whole = (
        SceneCaptions(seed, config.pictures, **kind) for seed, kind in enumerate((CLOSE, WIDE, WHOLE), start=11)
    )
    for stage, source in {"words": close, "close": close, "wide": wide, "whole": whole}.items():
        loop: LoopConfig = getattr(config, stage)
        task = tasks.get(stage, ClipTask(clip, config.image)).requires_grad_(True)
        if stage == "words":
            clip.requires_grad_(False).visual.requires_grad_(True)
        measured = (lambda _step: word_probe(tasks["words"])) if stage == "words" else lambda _step: probe(clip)
        trainer = Trainer(
            task,
            source,
            clip_groups(task, loop.learning_rate, loop.weight_decay),
            loop,
            out / stage,
            description={"stage": stage, "loop": loop.model_dump(mode="json"), "pictures": config.pictures},
            validate=measured,
        )
        if not trainer.run().finished:
            raise KeyboardInterrupt
        clip.eval()
        save_clip(clip, LAB_CLIP, out)
    forget_unseen_tokens(clip, lexicon())
    save_clip(clip, LAB_CLIP, out)
    return clip


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clip = train_lab_clip(LabClipConfig(), options.out)
    print(probe(clip))


if __name__ == "__main__":
    main()
