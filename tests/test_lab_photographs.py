"""Captions from labelled and captioned photographs, and the informed start of a small image tower."""

import numpy as np
import pytest
import torch
from PIL import Image

from opensan.config import ImageConfig
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.lab.informed_start import informed_start, waves
from opensan.lab.photographs import (
    PICTURE_SIDE,
    WINDOW_VIEW,
    CaptionedCrops,
    CaptionedPhotographs,
    EvenMixture,
    PhotographWindows,
)
from opensan.model.backbones.clip_vit import ClipModel
from opensan.text.encoder import tokenize
from opensan.train.san import normalise

SKY = tokenize("sky")[1]


@pytest.fixture
def folder(tmp_path):
    """Two photographs: sky above road, with a car in the second that is too small to be worth a word."""
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for number in range(2):
        labels = np.zeros((300, 160), dtype=np.uint8)
        labels[150:] = 1
        if number:
            labels[150:156, 80:88] = 2
        picture = np.array([[90, 150, 240], [80, 80, 80], [200, 30, 30]], dtype=np.uint8)[labels]
        Image.fromarray(picture).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(labels).save(tmp_path / "labels" / f"{number}.png")
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    (tmp_path / "train.txt").write_text("0\n1\n")
    (tmp_path / "captions.tsv").write_text("0.png\ta road\n0.png\tthe sky\n1.png\ta car\n")
    return tmp_path


def test_a_crops_caption_names_what_it_shows(folder):
    source = CaptionedCrops(SegmentationFolder(folder, "train"))
    said = set()
    for position in range(60):
        image, text = source.load(position % 2, np.random.default_rng(position))
        assert image.shape == (PICTURE_SIDE, PICTURE_SIDE, 3)
        blue = (image[..., 2] > 160).mean()
        assert ("sky" in text) == (blue >= 0.1) or abs(blue - 0.1) < 0.03  # at the threshold, resizing decides
        assert "car" not in text
        said.add(text)
    assert {"a photo of a sky.", "a photo of a road.", "a photo of a road and a sky."} <= said


def test_windows_are_captioned_with_what_is_in_them(folder):
    source = PhotographWindows(SegmentationFolder(folder, "train"), None)
    for position in range(20):
        image, windows, texts, wrong = source.load(position % 2, np.random.default_rng(position))
        assert image.shape == (*WINDOW_VIEW.crop, 3) and windows.shape[0] == len(texts) and wrong == []
        for window, text in zip(windows, texts, strict=True):
            assert window.any()
            seen = np.kron(window, np.ones((16, 16), dtype=bool))
            blue = (image[seen][:, 2].astype(int) - image[seen][:, 0] > 40).mean()
            assert (SKY in text) == (blue >= 0.2) or 0.05 < blue < 0.35  # jitter and resizing blur the threshold


def test_photographs_come_with_one_of_their_captions(folder):
    (folder / "train.txt").write_text("0.png\n1.png\n")
    source = CaptionedPhotographs(folder)
    texts = {source.load(0, np.random.default_rng(seed))[1] for seed in range(20)}
    assert texts == {"a road", "the sky"}


def test_a_mixture_serves_small_and_large_sources_alike(folder):
    crops = CaptionedCrops(SegmentationFolder(folder, "train"))
    mixture = EvenMixture([crops, [None] * 5])
    assert len(mixture) == 10
    assert [mixture._at(index)[0] is crops for index in range(10)] == [True, False] * 5


def test_informed_start_gives_every_channel_as_much_to_say(small_config):
    visual = ClipModel(small_config.clip).visual
    generator = np.random.default_rng(0)
    coarse = [generator.integers(0, 256, (6, 6, 3), dtype=np.uint8) for _ in range(8)]
    pictures = [np.asarray(Image.fromarray(c).resize((48, 48), Image.Resampling.BICUBIC)) for c in coarse]
    informed_start(visual, pictures, ImageConfig())
    pixels = normalise(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), ImageConfig())
    with torch.no_grad():
        power = visual.conv1(pixels).flatten(2).transpose(0, 1).flatten(1).square().mean(dim=1)
    assert power.max() / power.min() < 6
    assert torch.equal(visual.positional_embedding[0], torch.zeros(32))


def test_neighbouring_positions_start_alike():
    table = waves(8, 32).unflatten(0, (8, 8))
    near = (table[3, 3] - table[3, 4]).norm()
    far = (table[3, 3] - table[7, 7]).norm()
    assert near < far
