"""Training a small CLIP on captions of lab scenes: windows, contrast, the teacher, and what the token table keeps."""

import numpy as np
import pytest
import torch

from opensan.config import ClipConfig, ImageConfig, TextConfig, VisionConfig
from opensan.lab.captions import lexicon
from opensan.lab.clip_training import (
    LabClipConfig,
    SceneTask,
    contrast,
    embed_images,
    forget_unseen_tokens,
    load_clip,
    read_windows,
    save_clip,
    train_lab_clip,
)
from opensan.lab.scene_pictures import CLOSE_UPS, WHOLE_SCENES, PictureKind, ScenePictures, tokens
from opensan.lab.teacher import CloseUpWords, Imitation, Teacher, TeacherTask, settle
from opensan.model.backbones.clip_vit import ClipModel
from opensan.text.encoder import pad_tokens
from opensan.train.config import LoopConfig
from opensan.train.san import normalise

SMALL = ClipConfig(
    embed_dim=16,
    quick_gelu=False,
    vision=VisionConfig(width=32, layers=4, heads=2, patch_size=8, image_size=96),
    text=TextConfig(width=16, layers=1, heads=2),
)


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return ClipModel(SMALL)


def _batch(kind: PictureKind, count: int):
    source = ScenePictures(3, count, kind, 8)
    return source.collate([source.load(index, np.random.default_rng(index)) for index in range(count)])


def test_a_picture_depends_on_its_index_and_generator_alone():
    source = ScenePictures(3, 10, WHOLE_SCENES, 8)
    first, again = (source.load(4, np.random.default_rng(0)) for _ in range(2))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1]) and first[2:] == again[2:]


@pytest.mark.parametrize("kind", [CLOSE_UPS, WHOLE_SCENES])
def test_a_batch_has_a_right_and_a_wrong_caption_for_every_window(kind):
    batch = _batch(kind, 6)
    queries, grid = kind.windows + 1, kind.crop // 8
    assert batch.images.shape == (6, 3, kind.crop, kind.crop) and batch.images.dtype == torch.uint8
    assert batch.windows.shape == (6, queries, grid, grid)
    assert batch.windows[:, 0].all() and batch.windows.any(dim=(2, 3)).all()
    assert len(batch.tokens) == len(batch.wrong_tokens) == 6 * queries
    assert (batch.tokens != batch.wrong_tokens).any(dim=1).all()


def test_the_whole_picture_as_a_window_is_what_clip_sees(clip):
    pixels = torch.randn(2, 3, 48, 64)
    features = clip.shallow_features(pixels, 3, ())
    whole = torch.ones(2, 1, *features.grid, dtype=torch.bool)
    with torch.no_grad():
        assert torch.allclose(read_windows(clip, features, whole)[:, 0], embed_images(clip, pixels), atol=1e-5)


def test_a_window_does_not_see_patches_outside_in_the_deep_layers(clip):
    features = clip.shallow_features(torch.randn(1, 3, 48, 48), 3, ())
    window = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    window[..., :3, :] = True
    with torch.no_grad():
        before = read_windows(clip, features, window)
        features.tokens[:, 1 + 18 :] = 5.0
        assert torch.equal(read_windows(clip, features, window), before)
        features.tokens[:, 1] = 5.0
        assert not torch.allclose(read_windows(clip, features, window), before)


def test_equal_captions_are_equally_right():
    tokens = torch.tensor([[1, 2], [1, 2], [3, 4]])
    good = torch.tensor([[9.0, 9.0, -9.0], [9.0, 9.0, -9.0], [-9.0, -9.0, 9.0]])
    losses = contrast(good, tokens, None)
    half = float(np.log(2)) / 2  # two captions share the first two pictures
    assert float(losses["loss_to_texts"]) == pytest.approx(half * 2 / 3, abs=1e-3)
    tempted = contrast(good, tokens, torch.full((3, 1), 12.0))
    assert float(tempted["loss_to_texts"]) > 1 and tempted["loss_to_images"] == losses["loss_to_images"]


def test_training_lowers_every_loss(clip):
    torch.manual_seed(0)
    image = ImageConfig()
    batch = _batch(PictureKind(side=64, crop=32, objects=(1, 2), radius=(0.2, 0.3), windows=2), 8)
    teacher = Teacher()
    settle(teacher, normalise(batch.images, image))
    task = SceneTask(clip, Imitation(teacher, 32, normalise(batch.images, image)), image, weight=2.0)
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    start = task(batch, None)
    for _ in range(60):
        losses = task(batch, None)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert set(losses) == {"loss_to_texts", "loss_to_images", "loss_wrong", "loss_imitation"}
    assert all(losses[name] < 0.8 * start[name] for name in losses)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_teacher_learns_colours_at_once():
    torch.manual_seed(0)
    source = CloseUpWords(5, 64)
    batch = source.collate([source.load(index, np.random.default_rng(index)) for index in range(64)])
    task = TeacherTask(Teacher(), ImageConfig())
    optimizer = torch.optim.AdamW(task.parameters(), lr=4e-3)
    losses = []
    for _ in range(25):
        values = task(batch, None)
        optimizer.zero_grad()
        sum(values.values()).backward()
        optimizer.step()
        losses.append(values["loss_colour"].item())
    assert losses[-1] < 0.2 * losses[0]


def test_a_settled_teacher_normalises_its_own_pictures():
    torch.manual_seed(0)
    teacher, pixels = Teacher(), 3 * torch.randn(40, 3, 40, 40) + 1
    settle(teacher, pixels)
    with torch.no_grad():
        features = teacher.body[:2](pixels)
    assert not teacher.training
    assert abs(features.mean().item()) < 0.02 and features.std().item() == pytest.approx(1, abs=0.02)


def test_unseen_tokens_are_forgotten_and_prompts_of_known_words_are_not(clip):
    known = pad_tokens([tokens("a photo of a striped blue star."), tokens("There is a night sky in the scene")])
    strange = pad_tokens([tokens("a photo of a giraffe.")])
    with torch.no_grad():
        before, giraffe = clip.embed_prompts(known), clip.embed_prompts(strange)
        forget_unseen_tokens(clip, lexicon())
        assert torch.equal(clip.embed_prompts(known), before)
        assert not torch.equal(clip.embed_prompts(strange), giraffe)
    rows = clip.token_embedding.weight.abs().sum(dim=1)
    assert 20 < int((rows > 0).sum()) < 100


def test_a_saved_clip_is_read_back(clip, tmp_path):
    save_clip(clip, SMALL, tmp_path)
    again, config = load_clip(tmp_path)
    assert config == SMALL
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in clip.state_dict().items())


@pytest.mark.slow
def test_the_recipe_runs_through_its_stages_and_does_nothing_when_called_again(tmp_path):
    def short(batch_size: int) -> LoopConfig:
        return LoopConfig(steps=2, batch_size=batch_size, learning_rate=1e-3, save_every=1, log_every=1)

    config = LabClipConfig(teacher=short(8), close=short(4), scenes=short(2))
    first = train_lab_clip(config, tmp_path)
    again = train_lab_clip(config, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert load_clip(tmp_path)[1].vision.patch_size == 8
