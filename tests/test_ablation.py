"""Ablations: variants differ in what they name alone, runs go on after a kill, and the table's figures are right."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from opensan.checkpoints import preset_config
from opensan.errors import UserError
from opensan.lab.ablation import run as running
from opensan.lab.ablation.data import CartoonScenes, in_another_style, photographs
from opensan.lab.ablation.run import Budget, Setup, ablate
from opensan.lab.ablation.table import (
    FIGURES,
    Row,
    as_csv,
    as_markdown,
    paired_difference,
    picture,
    verdict,
    write_results,
)
from opensan.lab.ablation.templates import IMAGENET_TEMPLATES
from opensan.lab.ablation.variants import BASE, VARIANTS, Variant, chosen
from opensan.lab.scenes import NOVEL_NAMES, SEGMENTATION_NAMES, make_scene

SMALL = Budget(steps=1, batch=2, crop=64, train=4, tests=1)
SETUP = Setup(SMALL, None, None)
CONFIG = SETUP.base_config(preset_config("tiny").clip)

FOLLOW = {"depth": {"fusion", "supervised_blocks"}}
"""What must follow a change, because the rest would not fit."""


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_variant_differs_in_what_it_names(variant):
    base, other = CONFIG.model_dump(), variant.config(CONFIG).model_dump()
    base |= base.pop("side_adapter")
    other |= other.pop("side_adapter")
    changed = {key for key in base.keys() | other.keys() if base.get(key) != other.get(key)}
    follow = set().union(*(FOLLOW.get(key, set()) for key in variant.changes))
    assert set(variant.changes) <= changed <= set(variant.changes) | follow
    assert variant.name == BASE or changed or variant.templates != "vild" or variant.method


def test_the_80_templates_are_those_of_clips_authors():
    metadata = pytest.importorskip("open_clip.zero_shot_metadata", reason="open_clip is not installed")
    assert [template("{}") for template in metadata.OPENAI_IMAGENET_TEMPLATES] == list(IMAGENET_TEMPLATES)
    assert len(set(IMAGENET_TEMPLATES)) == 80


def test_names_are_distinct_and_claims_are_told():
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS) and VARIANTS[0].name == BASE
    assert all(variant.claim for variant in VARIANTS[1:])


def test_chosen_variants_come_with_the_base():
    assert [variant.name for variant in chosen(["two-stage", "no fusion"])] == [BASE, "no fusion", "two-stage"]
    assert chosen([]) == list(VARIANTS)
    with pytest.raises(UserError, match="--only: no variant 'no fuson'; did you mean 'no fusion'"):
        chosen(["no fuson"])


def test_a_variant_that_cannot_be_built_stops_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "_one", lambda *_: pytest.fail("nothing may be trained"))
    deep = Variant("too deep", "", {"fusion": {1: 5}})
    with pytest.raises(UserError, match=r"variant too deep: .*fusion 1: 5 needs a side block below 6"):
        ablate([VARIANTS[0], deep], SETUP, 1, tmp_path)


def row(variant: str, seed: int, *mious: float) -> Row:
    return Row(variant, seed, dict(zip(FIGURES, mious, strict=True)), 1000, 2_000_000, 3.0, 4.0, f"{variant}-{seed}")


ROWS = [
    *(row(BASE, seed, 0.5 + seed / 100, 0.3, 0.2) for seed in range(3)),
    *(
        row("no fusion", seed, 0.4 + seed / 100 + 0.001 * (seed == 2), 0.3 + 0.05 * (seed - 1), 0.2)
        for seed in range(3)
    ),
    row("two-stage", 1, 0.1, 0.4, 0.2),
]


def test_differences_are_paired_by_seed():
    base, other = ([one for one in ROWS if one.variant == name] for name in (BASE, "no fusion"))
    difference = paired_difference(other, base, "base")
    values = [-0.1, -0.1, -0.099]
    half = 4.302652729911275 * np.std(values, ddof=1) / math.sqrt(3)  # Student's t, two degrees of freedom, 97.5 %
    assert difference.mean == pytest.approx(np.mean(values)) and difference.half == pytest.approx(half)
    assert verdict(difference) == "worse"
    assert verdict(paired_difference(other, base, "novel")) == "undecided"
    assert verdict(paired_difference(base, other, "base")) == "better"
    single = paired_difference(ROWS[-1:], base, "novel")
    assert single.mean == pytest.approx(0.1) and math.isnan(single.half) and verdict(single) == "undecided"
    assert paired_difference([row("two-stage", 7, 0, 0, 0)], base, "base") is None


def test_the_table_and_the_picture(tmp_path):
    table = as_markdown(ROWS, {"steps": 5})
    lines = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")]
    cells = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}
    assert cells[BASE][:4] == ["3", "51.0 ± 1.0", "30.0 ± 0.0", "20.0 ± 0.0"]
    assert cells["no fusion"][7] == "-10.0 ± 0.1" and cells["no fusion"][-1] == "undecided"
    assert cells["two-stage"][0] == "1" and cells["two-stage"][8] == "+10.0"
    assert len({len(line) for line in lines}) == 1 and "steps 5" in table
    plain = list(csv.DictReader(as_csv(ROWS).splitlines()))
    assert [one["variant"] for one in plain] == [BASE] * 3 + ["no fusion"] * 3 + ["two-stage"]
    assert float(plain[1]["miou_base"]) == pytest.approx(0.51)
    for path in write_results(ROWS, tmp_path, {"steps": 5}):
        assert path.stat().st_size
    drawn, empty = (np.asarray(picture(rows)) for rows in (ROWS, ROWS[:3]))
    assert len(drawn) > len(empty) and (drawn < 200).any()


def fake(done: list[str], stop_after: int | None = None):
    def one(variant, config, data, setup, seed, folder):
        if stop_after is not None and len(done) == stop_after:
            raise KeyboardInterrupt
        done.append(f"{variant.name} {seed}")
        return row(variant.name, seed, 0.5, 0.3, 0.2)

    return one


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    variants, done, said = chosen(["no fusion"]), [], []
    monkeypatch.setattr(running, "_one", fake(done, stop_after=3))
    with pytest.raises(KeyboardInterrupt):
        ablate(variants, SETUP, 2, tmp_path, say=said.append)
    assert "no fusion" in (tmp_path / "ablations.md").read_text(), "the table is written after every run"
    monkeypatch.setattr(running, "_one", fake(done))
    ablate(variants, SETUP, 2, tmp_path, say=said.append)
    assert done == ["base 0", "base 1", "no fusion 0", "no fusion 1"]
    ablate(variants, SETUP, 3, tmp_path, say=said.append)
    assert done[4:] == ["base 2", "no fusion 2"]
    assert not [line for line in said if "other settings" in line]
    ablate(variants, Setup(replace(SMALL, steps=2), None, None), 1, tmp_path, say=said.append)
    assert done[6:] == ["base 0", "no fusion 0"] and [line for line in said if "other settings" in line]


def test_a_stopped_training_is_continued(tmp_path, monkeypatch):
    """The folder of a run that was stopped is where the next call finds it."""
    folders = []

    def train(model, dataset, config, out, **_):
        folders.append(out)
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "train_san", train)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            ablate(chosen(["no fusion"]), SETUP, 1, tmp_path)
    assert folders[0] == folders[1]


def test_variants_are_trained_and_tested(tmp_path, run):
    """For real, with one step: a SAN, a baseline on a trained model, and one that trains nothing."""
    only = [option for name in ("two-stage", "dense CLIP") for option in ("--only", name)]
    budget = ["--steps", 1, "--batch", 2, "--crop", 64, "--scenes", 4, "--tests", 4]
    code, out, err = run("lab", "ablate", *only, "--seeds", 1, *budget, "-o", tmp_path / "out")
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "out" / "runs.csv").read_text().splitlines()))
    assert [one["variant"] for one in rows] == [BASE, "two-stage", "dense CLIP"]
    assert len({one["identity"] for one in rows}) == 3
    assert all(0 <= float(one[f"miou_{figure}"]) <= 1 for one in rows for figure in FIGURES)
    trained = [int(one["trained_parameters"]) for one in rows]
    assert trained[0] > trained[1] > trained[2] == 0
    costs = [int(one["multiply_adds"]) for one in rows]
    assert costs[1] > 5 * costs[0]
    assert "| two-stage | 1 |" in out and not (tmp_path / "out" / "running").exists()


def test_the_command_tells_its_variants_and_what_is_wrong(run, tmp_path):
    code, out, _ = run("lab", "ablate", "--list")
    assert code == 0 and [line[:26].strip() for line in out.splitlines()] == [variant.name for variant in VARIANTS]
    for arguments, problem in (
        (["--only", "magic"], "--only: no variant 'magic'"),
        (["--crop", 100], "--crop 100: not a multiple of 32; the nearest is 96"),
        (["--data", "photographs"], "--data photographs needs --root"),
    ):
        code, _, err = run("lab", "ablate", *arguments, "-o", tmp_path / "out")
        assert code == 1 and problem in err and err.count("\n") == 1


def test_another_style_keeps_the_regions():
    scene = make_scene(5, 1, (96, 128), split="test")
    drawn = in_another_style(scene)
    assert drawn.shape == scene.image.shape and drawn.dtype == np.uint8
    region = scene.index_map == 0
    assert drawn[region].astype(float).std() < scene.image[region].astype(float).std() * 1.2
    dataset = CartoonScenes(5, 3, (96, 128), "test", SEGMENTATION_NAMES)
    image, labels = dataset[1]
    np.testing.assert_array_equal(image, drawn)
    assert set(np.unique(labels)) <= set(range(len(SEGMENTATION_NAMES))) and set(NOVEL_NAMES) < set(SEGMENTATION_NAMES)


def test_photographs_are_two_sets(tmp_path):
    words = {"camvid": ("road", "sky"), "labelmefacade": ("door", "sky")}
    for name, names in words.items():
        folder = tmp_path / name
        for part in ("images", "labels"):
            (folder / part).mkdir(parents=True)
        (folder / "classes.txt").write_text("\n".join(names) + "\n")
        for split in ("train", "test"):
            stems = [f"{split}{number}" for number in range(5)]
            (folder / f"{split}.txt").write_text("\n".join(stems) + "\n")
            for stem in stems:
                Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "images" / f"{stem}.png")
                Image.fromarray(np.ones((32, 32), np.uint8)).save(folder / "labels" / f"{stem}.png")
    data = photographs(tmp_path, 3)
    assert [len(test.dataset) for test in data.tests] == [3, 3] and len(data.train) == 5
    assert data.tests[0].figures == {"base": {"road", "sky"}}
    assert data.tests[1].figures == {"novel": ["door"], "cross-style": {"door", "sky"}}
    assert data.tests[1].dataset[2][1].max() == 1
    with pytest.raises(UserError, match=r"labelmefacade: no such folder; --data photographs needs it in --root"):
        (tmp_path / "labelmefacade").rename(tmp_path / "elsewhere")
        photographs(tmp_path, 3)
