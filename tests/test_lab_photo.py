"""The recipe of the packaged model for photographs: crops, cut-outs, queries that have a place, and names."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from opensan.config import EfficientNetLiteConfig, ImageConfig, ModelConfig, SideAdapterConfig, TextConfig
from opensan.data.augment import AugmentConfig
from opensan.lab.photo.anchors import AnchoredTask, alike_is_together, anchored_start, mask_losses, segments_of_queries
from opensan.lab.photo.crops import Crops
from opensan.lab.photo.names import (
    LOOP,
    NamedBatch,
    NamedPhotographs,
    NamedSet,
    Names,
    fit_names,
    pixel_loss,
    set_names,
    word_rows,
)
from opensan.lab.photo.paste import CutOuts
from opensan.lab.photo.proposals import Proposed, collect_proposals, propose
from opensan.lab.photo.sets import HIDDEN, PhotoSet
from opensan.lab.photo.sharpen import sharpen
from opensan.model import SAN, build_san
from opensan.structures import TextClassifier
from opensan.train.matcher import LossWeights

CLASSES = ("background", "person", "bus", "dog")
AUGMENT = AugmentConfig(short_sides=(64,), crop=(64, 64))


def made() -> SAN:
    """A small SAN with 16 queries, started on a grid."""
    config = ModelConfig(
        name="small",
        clip=EfficientNetLiteConfig(
            kind="efficientnet_lite", variant="lite0", embed_dim=32, text=TextConfig(width=16, layers=1, heads=2)
        ),
        side_adapter=SideAdapterConfig(
            width=160,
            depth=3,
            heads=4,
            patch_size=8,
            image_size=64,
            queries=16,
            fusion={0: 3, 1: 2, 2: 1},
            supervised_blocks=(2, 3),
            mask_channels=32,
            mlp_channels=32,
        ),
        recognition_layer=3,
        clip_scale=1.0,
        image=ImageConfig(short_side=64, mean=(127.0,) * 3, std=(128.0,) * 3),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_san(config)
        anchored_start(model.side_adapter, 4)
    return model


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twelve photographs of 64x64: a red person and a green bus on grey, a blue dog on every second."""
    for kind in ("images", "labels"):
        (tmp_path / "coco_small" / kind).mkdir(parents=True)
    (tmp_path / "coco_stuff_few" / "images").mkdir(parents=True)
    (tmp_path / "coco_small" / "classes.txt").write_text("\n".join(CLASSES))
    for number in range(12):
        image, labels = np.full((64, 64, 3), 128, np.uint8), np.zeros((64, 64), np.uint8)
        for value, colour, where in (
            (1, 0, np.s_[8:40, 4:28]),
            (2, 1, np.s_[36:60, 34:60]),
            (3, 2, np.s_[4:20, 40:60]),
        ):
            if value < 3 or number % 2:
                image[where], labels[where] = np.eye(3, dtype=np.uint8)[colour] * 255, value
        Image.fromarray(image).save(tmp_path / "coco_small" / "images" / f"{number}.jpg", quality=95)
        Image.fromarray(labels).save(tmp_path / "coco_small" / "labels" / f"{number}.png")
    return tmp_path


def photographs(root: Path) -> PhotoSet:
    return PhotoSet(root, "coco_small", "train", masks_of_novel=False)


def test_pixels_of_novel_words_are_hidden_in_training(root: Path):
    train = photographs(root)
    assert "bus" not in train.vocabulary.names and "dog" in train.vocabulary.names
    labels = train[0][1]
    assert (labels[40:56, 40:56] == HIDDEN).all() and labels[0, 0] == -1
    whole = PhotoSet(root, "coco_small", "test")
    assert whole.vocabulary.names[whole[0][1][50, 50]] == "bus"


def test_each_query_gets_the_segment_under_it_and_small_segments_the_nearest_query():
    labels = torch.full((1, 16, 16), -1)
    labels[0, :8] = 5
    labels[0, 12:13, 12:13] = 7  # no cell's middle (2, 6, 10, 14) lies in it
    wanted = segments_of_queries(labels, 4).view(4, 4)
    assert (wanted[:2] == 5).all()
    assert wanted[3, 3] == 7
    assert (wanted[2] == -1).all() and (wanted[3, :3] == -1).all()


def test_mask_losses_are_small_for_the_segment_alone():
    labels = torch.full((1, 16, 16), -1)
    labels[0, :, :8], labels[0, 8:, 8:] = 0, 1
    left = torch.where(torch.arange(16) < 8, 20.0, -20.0).expand(16, 16)
    logits = torch.stack([left, -left, left, -left])[None]
    entropy, dice, outside = mask_losses(logits, labels, torch.tensor([[0, 0, -1, -1]]))
    assert dice[0, 0] < 0.01 and dice[0, 1] > 0.9
    assert entropy[0, 0] < 0.01 < 5 < entropy[0, 1]
    # The third covers 128 labelled pixels of 192, the fourth 64, at 20 each; half of the queries are such.
    torch.testing.assert_close(outside, torch.tensor(0.5 * 192 * 20 / 384), rtol=1e-3, atol=1e-3)


def test_queries_start_at_their_cells(root: Path):
    model = made()
    source = Crops(photographs(root), model, AUGMENT, 1, 0)
    batch = source.collate([source.load(index, np.random.default_rng(0)) for index in range(4)])
    alike_is_together(model, batch)
    noise = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        masks = model.propose(noise).mask_logits
    best = masks.flatten(2).argmax(2)
    rows, columns = best // 8, best % 8
    cells = torch.arange(16)
    near = ((rows - (cells // 4) * 2 - 0.5).abs() <= 1.5) & ((columns - (cells % 4) * 2 - 0.5).abs() <= 1.5)
    assert near.float().mean() > 0.8


def test_a_crop_depends_on_its_number_alone(root: Path):
    model = made()
    first, second = (Crops(photographs(root), model, AUGMENT, 3, 0) for _ in range(2))
    generators = np.random.default_rng(1), np.random.default_rng(1)
    for index in (0, 3, 0):
        one, other = (source.load(index, random) for source, random in zip((first, second), generators, strict=True))
        assert torch.equal(one.image, other.image) and torch.equal(one.labels, other.labels)
        torch.testing.assert_close(one.features.tokens, other.features.tokens)
    assert first.load(0, np.random.default_rng(2)) is first.load(0, np.random.default_rng(2))


def test_cut_outs_bring_their_labels_and_no_novel_words(root: Path):
    cut_outs = CutOuts([photographs(root)])
    assert set(cut_outs.things) == {"person", "dog"}
    image, labels = np.full((64, 64, 3), 128, np.uint8), np.full((64, 64), -1, np.int16)
    generator = np.random.default_rng(0)
    pasted, new = cut_outs.paste(image, labels, ["road", "dog"], generator)
    assert set(np.unique(new)) == {-1, 1} and (labels == -1).all()
    there = new == 1
    assert (np.abs(pasted[there].astype(int) - [0, 0, 255]).max(1) < 90).mean() > 0.9
    assert (pasted[~there] == 128).all()
    assert cut_outs.paste(image, labels, ["road"], generator)[1] is labels


def test_training_finds_the_segments_and_leaves_the_tower_alone(root: Path):
    model = made()
    dataset = photographs(root)
    source = Crops(dataset, model, AUGMENT, 1, 0)
    batch = source.collate([source.load(index, np.random.default_rng(0)) for index in range(6)])
    alike_is_together(model, batch)
    words = len(dataset.vocabulary.names)
    rows = torch.nn.functional.normalize(torch.randn(words, 32, generator=torch.Generator().manual_seed(0)), dim=-1)
    others = torch.arange(words + 1) == words
    task = AnchoredTask(model, [TextClassifier(rows, torch.arange(words), words)], [others], LossWeights())
    before = {name: tensor.clone() for name, tensor in model.clip.state_dict().items()}
    optimizer = torch.optim.AdamW([one.parameter for one in model.trained()], lr=2e-3)
    dice = []
    for _ in range(25):
        losses = task(batch, None)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        dice.append(losses["loss_dice"].item())
    assert set(losses) == {f"loss_{kind}{end}" for kind in ("ce", "mask", "dice") for end in ("", "_0")}
    assert dice[-1] < 0.5 * dice[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.clip.state_dict().items())


def halves(count: int) -> list[Proposed]:
    """Two proposals: the left half is a dog, the right half is not labelled; features tell them apart."""
    generator = torch.Generator().manual_seed(0)
    left = (torch.arange(16) % 4 < 2).float()
    found = []
    for _ in range(count):
        means = torch.rand(2, 1280, generator=generator)
        means[0, :200] += 1
        means[1, 200:400] += 1
        found.append(Proposed(means.half(), torch.stack([left, 1 - left]).half(), torch.where(left > 0, 0, -1)))
    return found


def one_set(count: int = 6) -> NamedSet:
    return NamedSet(("dog", "sky", "grass"), torch.tensor([False, True, True]), 1.0, halves(count))


def test_the_loss_asks_for_the_label_or_for_any_word_of_the_ground_and_leaves_hidden_pixels_out():
    rest = torch.tensor([False, True, True])
    one = halves(1)[0]
    one = Proposed(one.means, one.masks.float(), one.labels)
    right = torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5]])
    assert pixel_loss(right, one, rest) < 1e-4
    everything_dog = torch.tensor([[1.0, 0, 0], [1.0, 0, 0]])
    assert pixel_loss(everything_dog, one, rest) > 3  # half of the pixels, by half weight
    assert pixel_loss(everything_dog, one, torch.zeros(3, dtype=torch.bool)) < 1e-4
    hidden = Proposed(one.means, one.masks, torch.where(one.labels < 0, HIDDEN, one.labels))
    assert pixel_loss(everything_dog, hidden, rest) < 1e-4


def test_small_things_count_for_more_than_their_pixels():
    masks = torch.stack([(torch.arange(16) != 15).float(), (torch.arange(16) == 15).float()])
    labels = torch.where(torch.arange(16) == 15, 1, 0)
    one = Proposed(torch.zeros(2, 1280), masks, labels)
    none = torch.zeros(2, dtype=torch.bool)
    small_wrong = pixel_loss(torch.tensor([[1.0, 0], [0.9, 0.1]]), one, none)
    torch.testing.assert_close(small_wrong, torch.tensor(-np.log(0.1) / (15**0.5 + 1), dtype=torch.float32))


def test_names_follow_the_proposals(tmp_path: Path):
    model, sets = made(), [one_set()]
    names = Names(model, sets)
    source = NamedPhotographs(sets)
    batch = source.collate([source.load(index, np.random.default_rng(index)) for index in range(4)])
    assert isinstance(batch, NamedBatch)
    before = names(batch, None)["loss_pixels"].item()
    assert fit_names(names, sets, tmp_path, LOOP.model_copy(update={"steps": 60, "warmup": 0, "batch_size": 4}))
    assert names(batch, None)["loss_pixels"].item() < 0.3 * before

    set_names(model, names)
    one = halves(1)[0]
    rows = word_rows(model, ["dog", "sky", "grass"])
    logits = model.clip.logit_scale.exp() * model.clip.embed(one.means.float()) @ rows.T
    expected = names.probabilities(one.means.float(), rows)
    torch.testing.assert_close(logits.softmax(-1), expected / expected.sum(-1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert expected[0].argmax() == 0 and expected[1, 1:].sum() > expected[1, 0]


def test_masks_of_novel_words_are_no_part_of_names():
    with pytest.raises(AssertionError):
        Names(made(), [replace(one_set(), words=("dog", "zebra", "grass"))])


def test_proposals_are_what_recognition_reads_and_are_kept(tmp_path: Path):
    model = made()
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    labels = np.zeros((64, 96), np.int16)
    labels[:, 48:] = -1
    found = propose(model, image, labels, 64)
    assert found.masks.shape == (16, 24) and found.labels.view(4, 6)[:, :3].eq(0).all()
    assert found.labels.view(4, 6)[:, 3:].eq(-1).all()

    class Pair:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
            return image, labels

    kept = collect_proposals(model, Pair(), 9, True, tmp_path / "set.safetensors")
    assert len(kept) == 4
    torch.testing.assert_close(kept[0].means.float(), found.means, rtol=1e-2, atol=1e-2)
    assert kept[1].labels[0] == -1 and kept[1].labels[-1] == 0  # mirrored
    rows = F.normalize(torch.randn(3, 32, generator=torch.Generator().manual_seed(1)), dim=-1)
    proposals = model.propose((torch.from_numpy(image).permute(2, 0, 1)[None].float() - 127) / 128)
    embedded = model.clip.embed(found.means)
    torch.testing.assert_close(embedded, proposals.mask_embeddings[0])
    text = TextClassifier(rows, torch.arange(3), 3)
    assert model.classify(proposals, text).shape == (1, 16, 4)
    again = collect_proposals(None, None, 9, True, tmp_path / "set.safetensors")
    assert torch.equal(again[3].masks, kept[3].masks)


def test_masks_are_sharpened_and_what_is_recognised_stays():
    model = made()
    head = model.side_adapter.head
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen: list[torch.Tensor] = []
    with torch.no_grad(), head.query_mlp.register_forward_hook(lambda _module, _inputs, answer: seen.append(answer)):
        before = model.propose(pixels)
    missed = sharpen(model, seen[0].flatten(0, 1), 2.0, -1.5)
    assert missed < 0.01
    with torch.no_grad():
        after = model.propose(pixels)
    torch.testing.assert_close(after.mask_logits, 2 * before.mask_logits - 1.5, atol=0.03, rtol=1e-4)
    assert torch.equal(after.mask_embeddings, before.mask_embeddings)
