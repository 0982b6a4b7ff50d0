"""The lab's scenes: seeded, exactly labelled, base words only where masks are learned; and their captions."""

import numpy as np
import pytest

from opensan.lab.captions import caption, lexicon, wrong_caption
from opensan.lab.grounds import GROUNDS, paint_ground
from opensan.lab.scenes import (
    BASE_NAMES,
    COLOURS,
    NOVEL_KINDS,
    NOVEL_NAMES,
    OBJECT_NAMES,
    SEGMENTATION_NAMES,
    SHAPES,
    UNLABELLED,
    SceneRegion,
    label_map,
    make_scene,
    novel_kind,
)


def test_a_scene_depends_on_its_seed_and_index_alone():
    first = make_scene(3, 7)
    make_scene(3, 8)
    again = make_scene(3, 7)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.index_map, again.index_map)
    assert first.regions == again.regions
    assert not np.array_equal(first.image, make_scene(3, 8).image)
    assert not np.array_equal(first.image, make_scene(4, 7).image)


@pytest.mark.parametrize("size", [(128, 128), (192, 256), (37, 61), (480, 640)])
def test_any_size_is_painted_and_labelled_everywhere(size):
    scene = make_scene(0, 0, size, split="test")
    assert scene.image.shape == (*size, 3) and scene.image.dtype == np.uint8
    assert scene.index_map.shape == size
    assert scene.index_map.max() < len(scene.regions)
    assert (label_map(scene) != UNLABELLED).all()


def test_mask_scenes_hold_base_words_only_and_the_others_every_word():
    masks = {region.name for index in range(400) for region in make_scene(0, index, (32, 32), split="masks").regions}
    assert masks == set(BASE_NAMES)
    for split in ("captions", "test"):
        seen = {region.name for index in range(400) for region in make_scene(1, index, (32, 32), split=split).regions}
        assert seen == set(SEGMENTATION_NAMES)


def test_base_and_novel_words_share_out_all_words_and_every_novel_kind_occurs():
    assert sorted([*BASE_NAMES, *NOVEL_NAMES]) == sorted(SEGMENTATION_NAMES)
    assert {novel_kind(name) for name in NOVEL_NAMES} == set(NOVEL_KINDS)
    # A composition is novel only if its parts are not: each has base words of the same colour and of the same shape.
    base_parts = {part for name in BASE_NAMES if name in OBJECT_NAMES for part in name.split()}
    for name in NOVEL_NAMES:
        if novel_kind(name) == "composition":
            assert set(name.split()) <= base_parts


def test_novel_kind_reads_textures_and_refuses_strangers():
    assert novel_kind("striped blue star") is None
    assert novel_kind("striped purple star") == "colour"
    assert novel_kind("dotted red heart") == "shape"
    for stranger in ("car", "star", "shiny red star", "red blue star", ""):
        with pytest.raises(ValueError, match="not a word of the lab"):
            novel_kind(stranger)


def test_labels_take_the_most_exact_name_that_is_listed():
    scene = next(s for s in (make_scene(0, index) for index in range(50)) if s.objects and s.objects[-1].texture)
    top = scene.objects[-1]
    here = scene.index_map == len(scene.regions) - 1
    assert here.any()
    for names in ([top.shape, top.name, top.full_name], [top.shape, top.name], [top.shape]):
        assert (label_map(scene, names)[here] == len(names) - 1).all()
    assert (label_map(scene, ["car"]) == UNLABELLED).all()


def test_masks_cover_the_object_and_nothing_else():
    """The drawn colour is found inside the mask, and the mask has the area of its shape."""
    areas: dict[str, list[float]] = {}
    for index in range(300):
        scene = make_scene(5, index, (96, 96), objects=(1, 1), radius=(0.2, 0.3))
        [what] = scene.objects
        inside = scene.index_map == len(scene.grounds)
        if min(*what.centre, *(96 - c for c in what.centre)) > 1.2 * what.radius:
            areas.setdefault(what.shape, []).append(inside.sum() / what.radius**2)
        if not what.texture:
            found = scene.image[inside].mean(axis=0)
            nearest = min(COLOURS, key=lambda name: np.abs(found / 0.9 - COLOURS[name]).sum())
            assert nearest == what.colour
    assert set(areas) == set(SHAPES)
    mean = {shape: np.mean(shares) for shape, shares in areas.items()}
    assert mean["circle"] == pytest.approx(np.pi * 0.92**2, rel=0.04)
    assert mean["square"] == pytest.approx(1.6**2, rel=0.04)
    assert mean["cross"] == pytest.approx(4 * 0.95 * 0.6 - 0.6**2, rel=0.05)
    assert mean["ring"] == pytest.approx(np.pi * (0.95**2 - 0.45**2), rel=0.05)
    assert all(max(shares) < 1.35 * min(shares) for shares in areas.values())


def test_no_object_is_hidden_by_another():
    for index in range(100):
        scene = make_scene(6, index, objects=(5, 5))
        seen = np.bincount(scene.index_map.ravel(), minlength=len(scene.regions))[len(scene.grounds) :]
        assert all(count > 0.3 * what.radius**2 for count, what in zip(seen, scene.objects, strict=True))


@pytest.mark.parametrize("name", GROUNDS)
def test_a_ground_looks_the_same_at_another_size(name):
    """Only finer: its mean colour and its contrast do not follow the number of pixels."""
    small, large = (
        np.concatenate([paint_ground(np.random.default_rng(seed), name, side, side) for seed in range(8)])
        for side in (64, 256)
    )
    assert np.abs(small.mean(axis=(0, 1)) - large.mean(axis=(0, 1))).max() < 20
    assert small.std() == pytest.approx(large.std(), rel=0.35)


def test_captions_name_what_is_there_and_only_words_of_the_lexicon():
    def words(text: str) -> set[str]:
        return set(text.replace(",", " ").replace(".", " ").lower().split())

    known = {word for text in lexicon() for word in words(text)}
    rng = np.random.default_rng(0)
    vocabulary = {*COLOURS, *SHAPES}
    for index in range(200):
        scene = make_scene(7, index, (32, 32))
        text = caption(scene.regions, rng)
        assert words(text) <= known
        true = {part for what in scene.objects for part in (what.colour, what.shape)}
        assert words(text) & vocabulary <= true
        assert all(what.shape in words(text) for what in scene.objects)


def test_a_wrong_caption_names_something_that_is_not_there():
    rng = np.random.default_rng(1)
    star = SceneRegion(texture="striped", colour="blue", shape="star")
    circle = SceneRegion(colour="red", shape="circle")
    for _ in range(200):
        assert "blue star" not in wrong_caption([SceneRegion(ground="grass"), star], rng)
        text = wrong_caption([star, circle], rng)
        assert ("blue star" in text) != ("red circle" in text)
        assert "grass" not in wrong_caption([SceneRegion(ground="grass")], rng)
    texts = [wrong_caption([star], rng) for _ in range(100)]
    assert any("blue" in text for text in texts) and any("star" in text for text in texts)
