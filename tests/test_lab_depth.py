"""Depth from words: scenes have exact distances, depth is the words' expectation, and one command measures it."""

import csv

import numpy as np
import pytest

from opensan.lab.depth import run as running
from opensan.lab.depth.measures import DepthMeasures, DepthScenes, LabelledDepthScenes, measure_baselines
from opensan.lab.depth.run import VARIANTS
from opensan.lab.depth.scenes import CAMERA_HEIGHT, DepthScene, Standing, View, draw_depth_scene, make_depth_scene
from opensan.lab.depth.table import MEASURES, depth_colours
from opensan.lab.depth.words import (
    DISTANCES,
    LEFT_OUT,
    NAMES,
    SHUFFLED,
    distance_words,
    expected_distance,
    metres,
    read_depth,
    word_map,
)
from opensan.segmenters.san import load_san

VIEW = View(horizon=0.25, wall=10.0, floor_ground="sand", wall_ground="brick")


def draw(*objects: Standing) -> DepthScene:
    return draw_depth_scene(np.random.default_rng(0), VIEW, objects, (80, 80))


def test_the_floor_recedes_to_the_wall():
    depth = draw().depth
    assert (depth == depth[:, :1]).all()
    below = (np.arange(80) + 0.5) / 80 - 0.25
    expected = [CAMERA_HEIGHT / share if share > 0.15 else 10.0 for share in below]  # 0.15 = 1.5 m / 10 m
    np.testing.assert_allclose(depth[:, 0], expected, rtol=1e-6)
    assert (np.diff(depth[:, 0]) <= 0).all() and depth[-1, 0] == pytest.approx(1.5 / 0.74375)


def test_objects_shrink_with_distance_and_nearer_ones_cover_farther_ones():
    near, far = (Standing(distance, 0, 0.4, shape="circle") for distance in (3.0, 6.0))
    areas = []
    for one in (near, far):
        scene = draw(one)
        assert (scene.depth[scene.on_object] == one.distance).all()
        areas.append(scene.on_object.sum())
        foot = np.flatnonzero(scene.on_object.any(axis=1)).max()  # where the floor is as far as the object
        assert scene.depth[foot, 0] == pytest.approx(one.distance, rel=0.15)
    assert areas[0] == pytest.approx(4 * areas[1], rel=0.15)
    for objects in ((near, far), (far, near)):
        both = draw(*objects)
        alone = draw(near).on_object
        assert (both.depth[alone & both.on_object] == 3.0).mean() > 0.95 and (both.depth == 6.0).any()


def test_a_scene_depends_on_its_seed_and_index_alone():
    first, again, other = make_depth_scene(3, 7), make_depth_scene(3, 7), make_depth_scene(3, 8)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.depth, again.depth)
    assert not np.array_equal(first.image, other.image)
    assert first.image.shape == (96, 96, 3) and first.image.dtype == np.uint8 and first.depth.dtype == np.float32


def test_a_pixel_has_the_nearest_word():
    depth = np.array([[0.5, 2.4, 2.6, 5.49, 9.2, 13.0]])
    assert [NAMES[index] for index in word_map(depth)[0]] == [
        f"{n} metres away" for n in ["two", "two", "three", "five", "ten", "twelve"]
    ]
    trained = [name for name in NAMES if name not in LEFT_OUT]
    labels = word_map(depth, trained)[0]
    assert [trained[index] if index >= 0 else None for index in labels] == [
        *("two metres away", "two metres away", None, "five metres away", None, "twelve metres away")
    ]
    assert not {NAMES[0], NAMES[-1]} & set(LEFT_OUT), "a word left out lies between trained ones"


def test_the_expectation_equals_a_plain_computation():
    rng = np.random.default_rng(0)
    scores = rng.random((9, 4, 5)).astype(np.float32)
    scores[:, 0, 0] = 0
    distances = metres(NAMES)
    depth = expected_distance(scores, distances)
    for y in range(4):
        for x in range(5):
            weights = scores[:, y, x] if scores[:, y, x].any() else np.ones(9)
            plain = sum(w * DISTANCES[name] for w, name in zip(weights, NAMES, strict=True)) / sum(weights)
            assert depth[y, x] == pytest.approx(plain, rel=1e-5)


@pytest.fixture(scope="module")
def tiny():
    return load_san("tiny", text_cache=False)


def test_the_words_lie_in_order_in_text_space(tiny, recwarn):
    rows = tiny.text.rows(distance_words())
    cosines = rows @ rows.T
    assert all((np.diff(line[place:]) < 0).all() for place, line in enumerate(cosines)), "farther words are less alike"
    np.testing.assert_array_equal(tiny.text.rows(distance_words(positions=SHUFFLED)), rows[list(SHUFFLED)])
    assert sorted(SHUFFLED) == list(range(9)) and not [one for one in recwarn if "never seen" in str(one.message)]


def test_depth_is_read_from_the_segmenters_scores(tiny):
    image = make_depth_scene(1, 0, (64, 64)).image
    expected, best = read_depth(tiny, image, distance_words())
    assert expected.shape == best.shape == (64, 64)
    segmentation = tiny.segment(image, distance_words())
    np.testing.assert_array_equal(best, metres(NAMES)[segmentation.labels])
    assert expected.min() >= 2 and expected.max() <= 12


def test_the_measures_equal_a_plain_computation():
    scenes = [make_depth_scene(2, index, (32, 32)) for index in range(3)]
    predictions = [scene.depth * np.float32(1.2) + np.float32(0.3) for scene in scenes]
    measures = DepthMeasures()
    for scene, depth in zip(scenes, predictions, strict=True):
        measures.add(scene, depth)
    truth, depth = np.stack([scene.depth for scene in scenes]), np.stack(predictions)
    figures = measures.figures()
    relative = np.abs(depth - truth) / truth
    assert figures["error"] == pytest.approx(relative.mean(), rel=1e-5)
    assert figures["rmse"] == pytest.approx(np.sqrt(((depth - truth) ** 2).mean()), rel=1e-5)
    assert figures["right"] == pytest.approx((depth / truth < 1.25).mean())
    assert figures["objects"] == pytest.approx(
        relative[np.stack([scene.on_object for scene in scenes])].mean(), rel=1e-5
    )
    absent = np.isin(word_map(truth), [NAMES.index(name) for name in LEFT_OUT])
    assert figures["left out"] == pytest.approx(relative[absent].mean(), rel=1e-5)
    assert set(figures) == set(MEASURES)


def test_the_baselines_need_no_image():
    train, test = DepthScenes(1, 6, (32, 32)), DepthScenes(2, 4, (32, 32))
    figures = measure_baselines(train, test)
    mean = np.mean([train.scene(index).depth for index in range(6)])
    truth = np.stack([test.scene(index).depth for index in range(4)])
    assert figures["mean depth"]["error"] == pytest.approx((np.abs(mean - truth) / truth).mean(), rel=1e-5)
    assert figures["mean of the row"]["error"] < figures["mean depth"]["error"]
    assert figures["true word"]["miou"] == 1 and 0 < figures["true word"]["error"] < 0.1


def test_words_left_out_are_unlabelled_in_training_and_asked_in_the_test():
    complete, partial = VARIANTS[0], VARIANTS[1]
    assert complete.words(all_words=False).names == complete.words(all_words=True).names == list(NAMES)
    assert partial.words(all_words=True).names == list(NAMES)
    assert not set(partial.words(all_words=False).names) & set(LEFT_OUT)
    scenes = DepthScenes(1, 2, (32, 32))
    _, labels = LabelledDepthScenes(scenes, partial.words(all_words=False))[0]
    absent = np.isin(word_map(scenes.scene(0).depth), [NAMES.index(name) for name in LEFT_OUT])
    np.testing.assert_array_equal(labels < 0, absent)


def test_near_is_bright_and_far_is_dark():
    colours = depth_colours(np.array([[1.0, 2.0, 5.0, 12.0, 20.0]])).astype(int).sum(-1)[0]
    assert colours[0] == colours[1] > colours[2] > colours[3] == colours[4]


SMALL = ["--seeds", 1, "--steps", 1, "--batch", 2, "--size", 32, "--scenes", 3, "--tests", 2]


def test_one_command_trains_tests_and_continues(tmp_path, run, monkeypatch):
    out = tmp_path / "out"
    code, printed, err = run("lab", "depth", *SMALL, "-o", out)
    assert code == 0, err
    rows = list(csv.DictReader((out / "runs.csv").read_text().splitlines()))
    assert list(dict.fromkeys(row["variant"] for row in rows)) == ["baselines", *(one.name for one in VARIANTS)]
    assert len(rows) == 3 + 2 + 4 + 2 + 4 and all(float(row["error"]) >= 0 for row in rows)
    assert "| in order | expected distance | 1 |" in printed and (out / "scenes.png").stat().st_size
    assert not (out / "running").exists()
    first = (out / "runs.csv").read_text()
    monkeypatch.setattr(running, "_train", lambda *_: pytest.fail("all runs are done"))
    assert run("lab", "depth", *SMALL, "-o", out)[0] == 0 and (out / "runs.csv").read_text() == first


def test_wrong_settings_are_refused_in_one_line(tmp_path, run):
    (tmp_path / "file").write_text("")
    for arguments, problem in (
        (["--size", 100, "-o", tmp_path / "out"], "--size 100: not a multiple of 32; the nearest is 96"),
        (["--only", "in ordr"], "--only: no training 'in ordr'; did you mean 'in order'"),
        (["--only", "magic"], "--only: no training 'magic': \"in order\", "),
        (["-o", tmp_path / "file"], "cannot write there"),
        (["--clip", tmp_path, "-o", tmp_path / "out"], f"{tmp_path}: has no config.json; a lab's CLIP is a folder"),
    ):
        code, _, err = run("lab", "depth", *arguments)
        assert code == 1 and problem in err and err.count("\n") == 1, err
