"""Train a small CLIP on images and captions by contrast (Radford et al., 2021); a small SAN is built around it.

    python -m opensan.lab.clip_training --out runs/lab-clip

Letters: B batch, L tokens, D embedding.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opensan.config import ClipConfig, Config, ImageConfig, TextConfig, VisionConfig, parse_config
from opensan.errors import UserError
from opensan.files import atomic_path, write_text
from opensan.lab.captions import lexicon
from opensan.lab.grounds import GROUNDS
from opensan.lab.informed_start import informed_start
from opensan.lab.scene_pictures import CLOSE_UPS, WHOLE_SCENES, ScenePictures, WindowBatch, tokens
from opensan.lab.scenes import SEGMENTATION_NAMES, Scene, make_scene, novel_kind
from opensan.lab.teacher import CloseUpWords, Imitation, Teacher, TeacherTask, settle, word_accuracy
from opensan.model.backbones.base import ShallowFeatures
from opensan.model.backbones.clip_vit import ClipModel
from opensan.text.encoder import pad_tokens, tokenize
from opensan.train.config import LoopConfig
from opensan.train.loop import Trainer
from opensan.train.optimizer import ParameterGroup
from opensan.train.san import normalise
from opensan.train.stream import TrainingSource

LAB_CLIP = ClipConfig(
    embed_dim=128,
    quick_gelu=False,
    vision=VisionConfig(width=128, layers=6, heads=4, patch_size=8, image_size=96),
    text=TextConfig(width=64, layers=3, heads=4),
)
"""About 4.7 million parameters, two thirds of them the token table."""

RECOGNITION_LAYER = 3
"""Windows are encoded by the layers after this one, and so should a SAN's proposals be."""

OUTSIDE = -100.0
"""Bias on the attention logits of patches outside a window: exp(-100) vanishes in float32."""

HIGHEST_SCALE = 100.0
"""Limit of the learned logit scale, the same as CLIP's."""


@dataclass(frozen=True)
class CaptionBatch:
    """Images and their captions."""

    images: Tensor
    """[B, 3, H, W] uint8 RGB."""
    tokens: Tensor
    """[B, L] int64."""

    def to(self, device: torch.device) -> "CaptionBatch":
        return CaptionBatch(self.images.to(device), self.tokens.to(device))


def collate_captions(samples: list[tuple[np.ndarray, str]]) -> CaptionBatch:
    """Collect images [H, W, 3] of one size, and their captions."""
    images, captions = zip(*samples, strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return CaptionBatch(pixels, pad_tokens([tokens(text) for text in captions]))


class ClipTask(nn.Module):
    """Symmetric contrastive loss within a batch; pairs with the same caption count as right."""

    def __init__(self, clip: ClipModel, image: ImageConfig) -> None:
        super().__init__()
        self.clip = clip
        self.image = image

    def prepare(self, batches: Sequence[CaptionBatch]) -> None:
        """Return nothing: the micro-batches of a step share no value."""

    def forward(self, batch: CaptionBatch, prepared: None) -> dict[str, Tensor]:
        images = embed_images(self.clip, normalise(batch.images, self.image))
        texts = self.clip.embed_prompts(batch.tokens)
        return contrast(logit_scale(self.clip) * images @ texts.T, batch.tokens, None)


def logit_scale(clip: ClipModel) -> Tensor:
    """Return the factor of similarities in training: learned, within CLIP's limit."""
    return clip.logit_scale.clamp(max=float(np.log(HIGHEST_SCALE))).exp()


def contrast(logits: Tensor, tokens: Tensor, against: Tensor | None) -> dict[str, Tensor]:
    """Return the symmetric contrastive loss of `logits` [N, N] (images by captions).

    Captions of equal `tokens` [N, L] count as the same. `against` [N, M]: scores of captions that are wrong.
    """
    same = (tokens.unsqueeze(0) == tokens.unsqueeze(1)).all(dim=2)
    target = same / same.sum(dim=1, keepdim=True)
    all_texts = logits if against is None else torch.cat([logits, against], dim=1)
    to_texts = -(target * all_texts.log_softmax(dim=1)[:, : len(logits)]).sum(dim=1).mean()
    to_images = -(target * logits.T.log_softmax(dim=1)).sum(dim=1).mean()
    return {"loss_to_texts": to_texts / 2, "loss_to_images": to_images / 2}


class SceneTask(nn.Module):
    """Contrastive loss between windows and their captions, and imitation of the teacher by shallow features.

    Windows are encoded as a SAN encodes its proposals: copies of the class token that attend to some of the patches
    only, in the layers after RECOGNITION_LAYER.
    """

    def __init__(self, clip: ClipModel, teacher: Imitation, image: ImageConfig, weight: float) -> None:
        super().__init__()
        self.clip = clip
        self.teacher = teacher
        self.image = image
        self.weight = weight

    def prepare(self, batches: Sequence[WindowBatch]) -> None:
        """Return nothing: the micro-batches of a step share no value."""

    def forward(self, batch: WindowBatch, prepared: None) -> dict[str, Tensor]:
        pixels = normalise(batch.images, self.image)
        features = self.clip.shallow_features(pixels, RECOGNITION_LAYER, (RECOGNITION_LAYER,))
        images = read_windows(self.clip, features, batch.windows).flatten(0, 1)
        captions, wrong = self.clip.embed_prompts(torch.cat([batch.tokens, batch.wrong_tokens])).chunk(2)
        scale = logit_scale(self.clip)
        right = scale * (images * captions).sum(dim=1)
        against = scale * (images * wrong).sum(dim=1)
        losses = contrast(scale * images @ captions.T, batch.tokens, against.unsqueeze(1))
        return {
            **losses,
            "loss_wrong": 0.5 * F.softplus(against - right).mean(),
            "loss_imitation": self.weight * self.teacher(features.maps[RECOGNITION_LAYER].tokens, pixels),
        }


def read_windows(clip: ClipModel, features: ShallowFeatures, windows: Tensor) -> Tensor:
    """Encode `windows` [B, Q, h, w] bool on the grid of patches: unit embeddings [B, Q, D]."""
    bias = torch.where(windows, 0.0, OUTSIDE).unsqueeze(1)
    heads = clip.attention_heads
    return clip.recognise(features, bias.expand(-1, heads, -1, -1, -1))


def image_features(clip: ClipModel, pixels: Tensor) -> Tensor:
    """Return image features [B, D], before normalisation, of pixels [B, 3, H, W] of any size that patches fill."""
    visual = clip.visual
    features = clip.shallow_features(pixels, len(visual.transformer.resblocks), ())
    return visual.ln_post(features.tokens[:, 0]) @ visual.proj


def embed_images(clip: ClipModel, pixels: Tensor) -> Tensor:
    """Return unit image embeddings [B, D] of normalised pixels [B, 3, H, W]."""
    return F.normalize(image_features(clip, pixels).float(), dim=-1)


def clip_groups(clip: nn.Module, learning_rate: float, weight_decay: float) -> list[ParameterGroup]:
    """Group parameters: matrices with weight decay; biases, norms, position tables and the scale without."""
    trained = [(name, p) for name, p in clip.named_parameters() if p.requires_grad]
    decayed = {name for name, p in trained if p.ndim > 1 and "positional" not in name}
    groups = []
    for decay in (weight_decay, 0.0):
        members = [(name, p) for name, p in trained if (name in decayed) == (decay > 0)]
        names, parameters = zip(*members, strict=True)
        groups.append(ParameterGroup(names, parameters, learning_rate, decay))
    return groups


@functools.cache
def _probe_scenes(count: int = 600, seed: int = 99) -> tuple[Tensor, list[str]]:
    """Return images [count, 3, 40, 40] of one object each, and their "colour shape" names."""
    scenes = [
        make_scene(seed, index, (48, 48), split="test", objects=(1, 1), radius=(0.4, 0.45)) for index in range(count)
    ]
    pictures = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
    return pictures, [scene.objects[0].name for scene in scenes]


def _accuracies(predictions: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Return the share of right predictions by kind of word, and of right colours and shapes."""
    right: dict[str, list[bool]] = {}
    for prediction, name in zip(predictions, names, strict=True):
        right.setdefault(novel_kind(name) or "base", []).append(prediction == name)
        right.setdefault("colour_alone", []).append(prediction.split()[0] == name.split()[0])
        right.setdefault("shape_alone", []).append(prediction.split()[-1] == name.split()[-1])
    return {f"accuracy_{kind}": float(np.mean(hits)) for kind, hits in sorted(right.items())}


@torch.inference_mode()
def probe(clip: ClipModel) -> dict[str, float]:
    """Return the zero-shot accuracy on images of one object, among all words of the lab, by kind of word."""
    clip.eval()
    pictures, names = _probe_scenes()
    rows = clip.embed_prompts(pad_tokens([tokens(f"a photo of a {name}.") for name in SEGMENTATION_NAMES]))
    best = (embed_images(clip, normalise(pictures, ImageConfig())) @ rows.T).argmax(dim=1).tolist()
    clip.train()
    return _accuracies([SEGMENTATION_NAMES[index] for index in best], names)


@functools.cache
def _region_scenes(count: int = 100, seed: int = 55) -> list[Scene]:
    return [make_scene(seed, index, (96, 96), split="test") for index in range(count)]


@torch.inference_mode()
def region_probe(clip: ClipModel) -> dict[str, float]:
    """Return the accuracy on whole scenes' regions, encoded by true masks: the limit for a SAN around this CLIP."""
    clip.eval()
    rows = clip.embed_prompts(pad_tokens([tokens(f"a photo of a {name}.") for name in SEGMENTATION_NAMES]))
    predictions, names = [], []
    for scene in _region_scenes():
        pixels = normalise(torch.from_numpy(scene.image).permute(2, 0, 1).unsqueeze(0), ImageConfig())
        features = clip.shallow_features(pixels, RECOGNITION_LAYER, ())
        masks = torch.stack([torch.from_numpy(scene.index_map == index) for index in range(len(scene.regions))])
        windows = F.adaptive_avg_pool2d(masks.float(), features.grid) > 0.3
        best = (read_windows(clip, features, windows.unsqueeze(0))[0] @ rows.T).argmax(dim=1).tolist()
        predictions += [SEGMENTATION_NAMES[index] for index in best]
        names += [region.name for region in scene.regions]
    clip.train()
    right: dict[str, list[bool]] = {}
    for prediction, name in zip(predictions, names, strict=True):
        kind = novel_kind(name) or ("base_ground" if name in GROUNDS else "base")
        right.setdefault(kind, []).append(prediction == name)
    return {f"region_{kind}": float(np.mean(hits)) for kind, hits in sorted(right.items())}


def forget_unseen_tokens(clip: ClipModel, texts: Sequence[str]) -> None:
    """Set the embedding of every token that no caption holds to zero, so that unseen words have no random meaning."""
    in_captions = torch.zeros(len(clip.token_embedding.weight), dtype=torch.bool)
    for text in texts:
        in_captions[tokenize(text)] = True
    clip.token_embedding.weight.data[~in_captions] = 0


def save_clip(clip: ClipModel, config: ClipConfig, folder: Path) -> None:
    """Write clip.safetensors and config.json, each all or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "clip.safetensors") as temporary:
        save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, temporary)
    write_text(folder / "config.json", config.model_dump_json(indent=2) + "\n")


def load_clip(folder: Path) -> tuple[ClipModel, ClipConfig]:
    """Read the model and configuration that `save_clip` wrote. Raises UserError, one line, if there are none."""
    for name in ("config.json", "clip.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: has no {name}; a lab's CLIP is a folder that opensan.lab.clip_training wrote")
    config = parse_config(ClipConfig, _read_json(folder / "config.json"), str(folder / "config.json"))
    clip = ClipModel(config).eval()
    clip.load_state_dict(load_file(folder / "clip.safetensors"))
    return clip, config


def _read_json(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def _stage(steps: int, batch_size: int, learning_rate: float, **others) -> LoopConfig:
    return LoopConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=0.05,
        warmup=50,
        clip_norm=3.0,
        save_every=100,
        log_every=50,
        workers=1,
        **others,
    )


class LabClipConfig(Config):
    """Configuration: a teacher learns the words of close-ups; CLIP learns close-ups and their captions; then scenes."""

    teacher: LoopConfig = _stage(1_500, 64, 4e-3, validate_every=500)
    close: LoopConfig = _stage(2_500, 96, 1e-3, seed=1, validate_every=250)
    scenes: LoopConfig = _stage(1_000, 48, 1e-3, seed=2, validate_every=250)
    imitation: tuple[float, float] = (8.0, 5.0)
    """Weight of the teacher's features in the two stages of the CLIP."""
    pictures: int = 200_000
    """Scenes of each kind; more than the stages take, so that none is repeated."""
    image: ImageConfig = ImageConfig()


def train_lab_clip(config: LabClipConfig, out: Path) -> ClipModel:
    """Train from nothing; `out` holds the runs, and at the end clip.safetensors and config.json. Resumes."""
    patch = LAB_CLIP.vision.patch_size
    close, whole = (
        ScenePictures(seed, config.pictures, kind, patch) for seed, kind in ((11, CLOSE_UPS), (13, WHOLE_SCENES))
    )
    samples = [close.scene(index).image for index in range(400)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip, teacher = ClipModel(LAB_CLIP), Teacher()
        informed_start(clip.visual, samples, config.image)
        _run_stage(
            "teacher",
            config,
            TeacherTask(teacher, config.image),
            CloseUpWords(21, config.pictures),
            out,
            lambda _step: word_accuracy(teacher, config.image),
        )
        pixels = normalise(torch.from_numpy(np.stack(samples)).permute(0, 3, 1, 2), config.image)
        settle(teacher, pixels)
        imitation = Imitation(teacher, LAB_CLIP.vision.width, pixels[:100])
        for (stage, source), weight in zip((("close", close), ("scenes", whole)), config.imitation, strict=True):
            task = SceneTask(clip, imitation, config.image, weight)
            _run_stage(stage, config, task, source, out, lambda _step: probe(clip) | region_probe(clip))
            clip.eval()
            save_clip(clip, LAB_CLIP, out)
    forget_unseen_tokens(clip, lexicon())
    save_clip(clip, LAB_CLIP, out)
    return clip


def _run_stage(
    stage: str,
    config: LabClipConfig,
    task: nn.Module,
    source: TrainingSource,
    out: Path,
    validate: Callable[[int], dict[str, float]],
) -> None:
    loop: LoopConfig = getattr(config, stage)
    trainer = Trainer(
        task,
        source,
        clip_groups(task, loop.learning_rate, loop.weight_decay),
        loop,
        out / stage,
        description={"stage": stage, "loop": loop.model_dump(mode="json"), "pictures": config.pictures},
        validate=validate,
    )
    if not trainer.run().finished:
        raise KeyboardInterrupt


def main() -> None:
    """Run the command line."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clip = train_lab_clip(LabClipConfig(), options.out)
    print(probe(clip) | region_probe(clip))


if __name__ == "__main__":
    main()
