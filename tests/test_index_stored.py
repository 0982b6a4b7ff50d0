"""What an index stores: masks in two bits, the contrast words' part of each proposal, and indexes of format 1."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval import mask as coco_mask

import opensan
from opensan.errors import UserError
from opensan.files import ASSETS
from opensan.index import scoring
from opensan.index.contrast import Contrast, log_sum
from opensan.index.head import Head
from opensan.index.masks import mask_cells, mask_logits, stored_mask
from opensan.index.rows import schemas
from opensan.index.store import PROPOSALS, Store

lancedb = pytest.importorskip("lancedb", reason="indexes need lancedb")

SCENES = ASSETS / "scenes"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """An index of the package's scenes. Not to be changed."""
    index = opensan.Index(tmp_path_factory.mktemp("scenes") / "index", "tiny")
    index.add(SCENES)
    return index


def of_format_1(index: opensan.Index, folder: Path) -> opensan.Index:
    """Copy an index as an earlier version of the package would have written it."""
    shutil.copytree(index.folder, folder)
    head = json.loads((folder / "index.json").read_text())
    store = Store.to_write(folder, head["versions"])
    grid = {row["id"]: (row["grid_height"], row["grid_width"]) for row in store.rows("images", ["id", *GRID])}

    def change(batch):
        rows = batch.to_pylist()
        for row in rows:
            inside = mask_cells(row["mask"], grid[row["image"]])
            row["mask"] = coco_mask.encode(np.asfortranarray(inside.astype(np.uint8)))["counts"]
        return type(batch).from_pylist(rows, schema=batch.schema)

    store.rewrite(PROPOSALS, change)
    store._tables[PROPOSALS].drop_columns(["contrast"])
    head = {name: value for name, value in head.items() if name != "contrast"}
    (folder / "index.json").write_text(json.dumps(head | {"format": 1, "versions": store.versions}))
    return opensan.Index(folder, index.segmenter)


GRID = ("grid_height", "grid_width")


def scores(answer) -> dict[str, float]:
    return {Path(match.path).name: match.score for match in answer}


@pytest.mark.parametrize("height, width", [(1, 1), (3, 5), (24, 32)])
def test_a_stored_mask_keeps_its_cells_and_the_mean_of_each_level(height, width):
    logits = np.random.default_rng(height).normal(-1, 4, (height, width)).astype(np.float32)
    stored = stored_mask(logits)
    back = mask_logits(stored, (height, width))
    assert np.array_equal(mask_cells(stored, (height, width)), logits > 0)
    for low, high in ((-99, -3), (-3, 0), (0, 3), (3, 99)):
        level = (logits > low) & (logits <= high)
        if level.any():
            assert back[level] == pytest.approx(logits[level].mean(), abs=0.02)
    assert len(stored) <= 9 + 20 + height * width / 4


def test_damaged_masks_are_said_and_never_grow():
    stored = stored_mask(np.ones((8, 8), np.float32))
    for damaged in (stored[:-3], stored[:9], b"\x02", stored[:9] + zlib.compress(bytes(10_000_000))):
        with pytest.raises(ValueError, match=r"mask|buffer"):
            mask_logits(damaged, (8, 8))
    with pytest.raises(ValueError, match="mask"):
        mask_cells(stored, (9, 9))


@pytest.mark.parametrize(
    "words, more",
    [
        ("grass", {}),  # a contrast word, which is left out
        ("green heart", {}),  # none
        ("green heart|grass|wood", {"by": "area"}),
        ("sky", {"also": ["brick"], "without": ["wood", "red circle"]}),
    ],
)
def test_scores_by_stored_contrasts_are_those_of_the_whole_softmax(scenes, monkeypatch, words, more):
    quick = scenes.search(words, least=0, **more)
    calls = []
    whole = scoring.Scorer._slowly
    monkeypatch.setattr(scoring.Scorer, "_slowly", lambda self, vectors: calls.append(0) or whole(self, vectors))
    assert scenes.search(words, least=0, **more).to_dict() == quick.to_dict() and len(calls) < 2  # it was quick indeed
    monkeypatch.setattr(Contrast, "identity", "others")
    slow = scenes.search(words, least=0, **more)
    assert len(calls) >= 2
    assert scores(quick) == pytest.approx(scores(slow), abs=1e-4)
    for one, other in zip(quick, slow, strict=True):
        near = [region.probability for region in other.regions]
        assert [region.probability for region in one.regions] == pytest.approx(near, abs=1e-4)


def test_where_few_digits_are_left_the_whole_softmax_decides(scenes, monkeypatch):
    plain = scores(scenes.search("grass"))
    monkeypatch.setattr(scoring, "LEAST", 2.0)
    assert scores(scenes.search("grass")) == pytest.approx(plain, abs=1e-4)
    monkeypatch.setattr(scoring.Scorer, "_slowly", lambda self, vectors: np.zeros((len(vectors), 1), np.float32))
    assert set(scores(scenes.search("grass")).values()) == {0}


def test_a_model_that_needs_more_than_vectors_is_refused_before_the_work(tmp_path):
    with pytest.raises(UserError, match="an index keeps a vector of each proposal, and two-stage-tiny needs more"):
        opensan.Index(tmp_path / "index", "two-stage:tiny").add(SCENES)
    assert not (tmp_path / "index").exists()


def test_the_logarithm_of_a_sum_bears_large_and_missing_numbers():
    logits = np.array([[1000.0, 1000.0], [-1000.0, -np.inf]], np.float32)
    assert log_sum(logits) == pytest.approx([1000 + np.log(2), -1000])
    assert log_sum(logits[:, :0]).tolist() == [-np.inf, -np.inf]


def test_an_index_of_format_1_is_read_and_becomes_one_of_format_2(scenes, tmp_path):
    old = of_format_1(scenes, tmp_path / "old")
    assert "contrast" not in Store(old.folder, Head.read(old.folder).versions)._tables[PROPOSALS].schema.names
    expected = scenes.search("grass")
    assert scores(old.search("grass")) == pytest.approx(scores(expected), abs=1e-4)
    mask, before = old.search("grass")[0].regions[0].mask, expected[0].regions[0].mask
    assert np.array_equal(mask, before)
    labels = dict(old.relabel("grass, brick, wood"))
    assert len(labels) == 3
    copy = shutil.copy(SCENES / "court.png", tmp_path / "court.png")
    Path(copy).write_bytes(Path(copy).read_bytes() + b"\0")
    added = old.add(copy)
    assert (added.new, added.same) == (1, []) and Head.read(old.folder).format == 2
    found = scores(old.search("grass"))
    assert len(old.search("grass")) == 4 and found["court.png"] == pytest.approx(
        scores(expected)["court.png"], abs=1e-4
    )
    done = []
    old.compact(progress=lambda count, total: done.append((count, total)))
    head = Head.read(old.folder)
    assert done[-1] == (head.proposals, head.proposals) and head.contrast == Contrast(old.segmenter).identity != ""
    store = Store(old.folder, head.versions)
    assert store.count(PROPOSALS, "contrast IS NULL") == 0
    assert store._tables[PROPOSALS].schema.names == schemas(head.width)[PROPOSALS].names
    assert scores(old.search("grass")) == pytest.approx(found, abs=1e-4)
    done.clear()
    old.compact(progress=lambda count, total: done.append((count, total)))
    assert not done  # nothing to do


def test_contrasts_of_other_words_are_not_used(scenes, tmp_path, monkeypatch):
    folder = shutil.copytree(scenes.folder, tmp_path / "index")
    index = opensan.Index(folder, scenes.segmenter)
    expected = scores(index.search("grass"))
    monkeypatch.setattr(Contrast, "identity", "0" * 64)
    monkeypatch.setattr(Contrast, "of", lambda self, vectors: np.full(len(vectors), 99, np.float32))
    picture = shutil.copy(SCENES / "court.png", tmp_path / "again.png")
    Path(picture).write_bytes(Path(picture).read_bytes() + b"\0")
    index.add(picture)
    assert Store(folder, Head.read(folder).versions).count(PROPOSALS, "contrast IS NULL") > 0
    found = scores(index.search("grass"))
    assert found.pop("again.png") == pytest.approx(found["court.png"], abs=1e-4)
    assert found == pytest.approx(expected, abs=1e-4)
    index.compact()
    assert max(scores(index.search("green heart")).values()) < 1e-9  # now those are


@pytest.mark.parametrize(
    "wrong",
    [
        {"images": "x"},
        {"width": "x"},
        {"width": -1},
        {"next_id": None},
        {"proposals": True},
        {"source": 7},
        {"contrast": 5},
        {"exact": "yes"},
        {"versions": {}},
        {"versions": {"images": "x", "proposals": 1}},
        {"surplus": 1},
    ],
)
def test_a_head_with_wrong_values_is_one_line(scenes, tmp_path, wrong):
    data = json.loads((scenes.folder / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(data))
    assert Head.read(tmp_path) == Head.read(scenes.folder)
    (tmp_path / "index.json").write_text(json.dumps(data | wrong))
    with pytest.raises(UserError, match=r"index.json: damaged \(.*\); copy the index from a backup") as caught:
        Head.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_mask_in_an_index_is_one_line(scenes, tmp_path):
    folder = shutil.copytree(scenes.folder, tmp_path / "index")
    head = Head.read(folder)
    store = Store.to_write(folder, head.versions)
    store._tables[PROPOSALS].update(values={"mask": b"\x02damaged"})
    data = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(data | {"versions": store.versions}))
    index = opensan.Index(folder, scenes.segmenter)
    for use in (lambda: index.search("grass"), lambda: list(index.relabel("grass, wood"))):
        with pytest.raises(UserError, match="damaged") as caught:
            use()
        assert "\n" not in str(caught.value) and str(SCENES) in str(caught.value)
