"""Indexes: encoded collections that are searched with any words, whatever happens while they are written."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import opensan
from opensan.errors import UserError
from opensan.files import ASSETS, hold
from opensan.index import collection as collection_module
from opensan.index.head import Head
from opensan.index.rows import soft_areas
from opensan.index.store import Store
from opensan.index.writer import LOCK, Writer
from opensan.segmenters.san import SanSegmenter

pytest.importorskip("lancedb", reason="indexes need lancedb")

SCENES = ASSETS / "scenes"
WORDS = ("night sky", "brick", "grass", "green heart")


@pytest.fixture(scope="module")
def tiny():
    return opensan.load("tiny")


@pytest.fixture(scope="module")
def small(small_model):
    return SanSegmenter(small_model, text_cache=False)


@pytest.fixture(scope="module")
def scenes(tiny, tmp_path_factory):
    """An index of the package's scenes. Not to be changed."""
    index = opensan.Index(tmp_path_factory.mktemp("scenes") / "index", tiny)
    assert index.add(SCENES).new == 3
    return index


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        picture(folder / f"{number}.png", number)
    return folder


@pytest.fixture
def index(tmp_path, photos, small):
    index = opensan.Index(tmp_path / "index", small)
    index.add(photos)
    return index


def picture(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC).save(path)


def content(index: opensan.Index) -> list[tuple]:
    """Everything that an index has, without the numbers of its images."""
    head = Head.read(index.folder)
    store = Store(index.folder, head.versions)
    rows = store.rows("images", ["id", "path", "crc32", "same_as", "image_height", "encoding"])
    path = {row["id"]: row["path"] for row in rows}
    images = sorted((r["path"], r["crc32"], path.get(r["same_as"], ""), r["image_height"], r["encoding"]) for r in rows)
    proposals = store.rows("proposals", ["image", "query", "vector", "area", "box", "mask"])
    assert head.images == len(images) and head.proposals == len(proposals)
    return [images, sorted((path[row.pop("image")], *map(str, row.values())) for row in proposals)]


def test_a_word_finds_the_image_and_the_region_that_show_it(scenes):
    answer = scenes.search("green heart", top=2)
    assert Path(answer[0].path).name == "playground.png"
    best = answer[0].regions[0]
    labels = scenes.segmenter.segment(SCENES / "playground.png", "green heart, night sky, grass, brick, red circle")
    heart = labels["green heart"]
    left, top, width, height = best.box
    inside = np.zeros_like(heart)
    inside[top : top + height, left : left + width] = True
    assert (best.mask & heart).sum() > 0.9 * best.mask.sum() and best.mask.mean() == pytest.approx(best.area, abs=0.01)
    assert (best.mask & inside).sum() > 0.95 * best.mask.sum() > 0.3 * inside.sum()
    assert answer[0].score > 0.9 > 0.1 > answer[1].score


@pytest.mark.parametrize("by", ["region", "area"])
def test_scores_are_those_of_the_models_rule(scenes, by):
    contrast = [word for word in WORDS if word != "brick"]
    for match in scenes.search("brick", against=contrast, by=by):
        encoding = scenes.segmenter.encode(match.path)
        vocabulary = opensan.Vocabulary.parse(["brick"], background=contrast)
        if by == "region":
            chances = np.asarray(scenes.segmenter.class_probabilities(encoding, vocabulary))[:, 0]
            shown = (np.asarray(encoding["mask_logits"]) > 0).any((1, 2))
            expected = chances[shown].max()
        else:
            scores = scenes.segmenter.scores(encoding, vocabulary)(slice(0, 480))
            expected = float(np.asarray(scores[0]).mean())
        assert match.score == pytest.approx(expected, abs=0.01)


def test_words_that_must_or_must_not_be_there_too(scenes):
    def found(**more: object) -> dict[str, float]:
        return {Path(match.path).name: match.score for match in scenes.search("grass", **more)}

    assert min(found()["court.png"], found()["workshop.png"]) > 0.5 > found()["playground.png"]
    with_wood = found(also=["wood"])
    assert with_wood["workshop.png"] > 10 * max(with_wood["court.png"], with_wood["playground.png"])
    without_wood = found(without=["wood"])
    assert without_wood["court.png"] > 0.5 and without_wood["workshop.png"] < found()["workshop.png"] - 0.2


def test_areas_are_those_of_the_resized_masks(scenes):
    from opensan.assemble.interpolation import resized_masks

    encoding = scenes.segmenter.encode(SCENES / "court.png")
    logits = np.asarray(encoding["mask_logits"])
    expected = resized_masks(logits, encoding.sizes).mean(axis=(1, 2))
    assert np.abs(soft_areas(logits, encoding.sizes) - expected).max() < 0.002


def test_images_are_encoded_once_and_again_when_they_change(index, photos):
    before = content(index)
    added = index.add(photos)
    assert (added.new, added.unchanged, content(index)) == (0, 4, before)
    picture(photos / "1.png", 99)
    picture(photos / "new.png", 5)
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    added = index.add(photos, batch=3)
    assert (added.new, added.changed, added.unchanged) == (1, 1, 3)
    assert len(added.broken) == 1 and "broken.png" in added.broken[0]
    fresh = opensan.Index(index.folder.with_name("fresh"), index.segmenter)
    fresh.add(photos)
    assert content(fresh) == content(index) != before


def test_one_content_under_two_names_is_encoded_once_and_said(index, photos):
    shutil.copy(photos / "0.png", photos / "copy.png")
    added = index.add(photos)
    assert added.new == 0 and [(path.name, Path(other).name) for path, other in added.same] == [("copy.png", "0.png")]
    assert index.add(photos).unchanged == 5
    (match,) = [m for m in index.search("cat", against=["dog"]) if m.path.endswith("0.png")]
    assert [Path(path).name for path in match.same] == ["copy.png"]
    proposals = index.info()["proposals"]
    assert index.remove(photos / "0.png") == 1  # the copy inherits
    assert index.info()["proposals"] == proposals
    assert [Path(path).name for path in index.paths()] == ["copy.png", "1.png", "2.png", "3.png"]
    picture(photos / "copy.png", 7)
    assert index.add(photos).changed == 1


def test_copies_in_one_batch_are_encoded_once(tmp_path, photos, small):
    for name in ("a.png", "b.png"):
        shutil.copy(photos / "0.png", photos / name)
    index = opensan.Index(tmp_path / "index", small)
    added = index.add(photos, batch=6)
    assert (added.new, len(added.same)) == (4, 2)
    assert index.info()["images"] == 6 and len(index.search("cat", against=["dog"])) == 4


def test_a_file_that_becomes_a_copy_of_another_stays_in_the_index(index, photos):
    shutil.copy(photos / "0.png", photos / "1.png")
    added = index.add(photos)
    assert (added.changed, len(added.same)) == (1, 1)
    assert len(index.paths()) == 4 and index.add(photos).unchanged == 4


def test_a_file_that_moved_keeps_its_encoding(index, photos):
    before = content(index)[1]
    (photos / "3.png").rename(photos / "moved.png")
    added = index.add(photos)
    assert (added.new, len(added.moved)) == (0, 1)
    assert [row[1:] for row in content(index)[1]] == [row[1:] for row in before]
    assert sorted(Path(path).name for path in index.paths()) == ["0.png", "1.png", "2.png", "moved.png"]


def test_another_model_is_refused_by_its_identity(index, photos, fresh_model):
    other = fresh_model()
    other.no_object_embedding.data += 1
    with pytest.raises(UserError, match=r"was made by model .*, not by"):
        opensan.Index(index.folder, SanSegmenter(other)).search("cat")
    with pytest.raises(UserError, match="was made by model"):
        opensan.Index(index.folder, SanSegmenter(other)).add(photos)
    with pytest.raises(UserError, match="was made at speed exact in float32, not"):
        opensan.Index(index.folder, SanSegmenter(fresh_model_as(index), speed="fastest", dtype="bfloat16")).add(photos)


def fresh_model_as(index: opensan.Index):
    return index.segmenter.model


@pytest.mark.parametrize("moment", ["store", "head"])
def test_a_run_that_dies_before_its_head_is_written_leaves_the_index_as_it_was(index, photos, monkeypatch, moment):
    before = content(index)
    picture(photos / "0.png", 50)
    picture(photos / "4.png", 51)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*((Writer, "_write_head") if moment == "store" else (Head, "write")), die)
        index.add(photos)
    assert content(index) == before
    assert index.add(photos).changed == 1
    fresh = opensan.Index(index.folder.with_name("fresh"), index.segmenter)
    fresh.add(photos)
    assert content(fresh) == content(index)


def test_a_killed_creation_is_made_again(tmp_path, photos, small, monkeypatch):
    index = opensan.Index(tmp_path / "index", small)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Head, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        index.add(photos)
    assert index.add(photos).new == 4


def test_writers_wait_and_readers_do_not(index, photos):
    picture(photos / "4.png", 4)
    free = threading.Event()
    with hold(index.folder / LOCK, "busy"):
        with pytest.raises(UserError, match="another process is writing"):
            index.add(photos, wait=0)
        assert len(index.search("cat", against=["dog"])) == 4
        waiting = threading.Thread(target=lambda: (index.add(photos), free.set()))
        waiting.start()
        assert not free.wait(0.3)
    waiting.join(60)
    assert free.is_set() and index.info()["images"] == 5


def test_a_reader_whose_files_are_compacted_away_takes_the_next_version(index, photos, monkeypatch):
    old = Head.read(index.folder)
    index.remove(photos / "0.png")
    index.compact()
    heads = iter([old, old])
    real = Head.read
    monkeypatch.setattr(collection_module.Head, "read", lambda folder: next(heads, None) or real(folder))
    assert len(index.search("cat", against=["dog"])) == 3


def test_removed_images_are_not_found_and_leave_no_bytes(index, photos):
    size = index.info()["bytes"]
    assert index.remove([photos / "0.png", photos / "1.png"]) == 2
    assert {Path(m.path).name for m in index.search("cat", against=["dog"])} == {"2.png", "3.png"}
    index.compact()
    assert index.info()["bytes"] < size
    (photos / "2.png").unlink()
    assert index.remove(missing=True) == 1
    with pytest.raises(UserError, match=r"has no image .*other\.png"):
        index.remove(photos / "other.png")


def test_a_copy_of_the_folder_is_a_backup(index, photos, tmp_path):
    shutil.copytree(index.folder, tmp_path / "backup")
    index.remove(photos)
    backup = opensan.Index(tmp_path / "backup", index.segmenter)
    assert (len(index.search("cat", against=["dog"])), len(backup.search("cat", against=["dog"]))) == (0, 4)
    assert backup.add(photos).unchanged == 4


def test_an_approximate_search_scores_exactly(index):
    store = Store.to_write(index.folder, Head.read(index.folder).versions)
    store.merge(approximate_from=1)
    assert store.is_approximate
    replace(Head.read(index.folder), versions=store.versions).write(index.folder)
    found = index.search("cat", against=["dog"])
    assert found.approximate
    exact = index.search("cat", against=["dog"], approximate=False)
    assert [(m.path, m.score) for m in found] == [(m.path, m.score) for m in exact]


def test_damaged_and_half_copied_indexes_are_one_line(index, photos, tmp_path):
    def copied(name: str) -> opensan.Index:
        shutil.copytree(index.folder, tmp_path / name)
        return opensan.Index(tmp_path / name, index.segmenter)

    newer = copied("newer")
    data = json.loads((newer.folder / "index.json").read_text())
    (newer.folder / "index.json").write_text(json.dumps(data | {"format": 3}))
    cut = copied("cut")
    (cut.folder / "index.json").write_text((cut.folder / "index.json").read_text()[:50])
    half = copied("half")
    for file in (half.folder / "proposals.lance" / "data").iterdir():
        file.unlink()
    short = copied("short")
    for file in (short.folder / "proposals.lance" / "data").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    without = copied("without")
    shutil.rmtree(without.folder / "images.lance")
    for damaged, message in (
        (newer, "format 3, and this version of opensan reads 1 to 2; update opensan"),
        (cut, "index.json: can't be read"),
        (half, "damaged or half copied"),
        (short, "damaged or half copied"),
        (without, "damaged or half copied"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            damaged.search("cat")
        assert "\n" not in str(caught.value)
        for change in (damaged.check, lambda index=damaged: index.add([photos]), damaged.compact):
            with pytest.raises(UserError, match=message) as caught:
                change()
            assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no index"):
        opensan.Index(photos, index.segmenter).search("cat")
    with pytest.raises(UserError, match="not an index, and not empty"):
        opensan.Index(photos, index.segmenter).add(photos)


def test_queries_that_mean_nothing_are_one_line(scenes):
    for words, message in (
        ("", "an empty query"),
        ("  ", "an empty query"),
        ("brick, sky", "are 2 words: search for one"),
        ("zebra", "the model has never read 'zebra'"),
    ):
        with pytest.raises(UserError, match=message):
            scenes.search(words)
    with pytest.raises(UserError, match="by region or by area"):
        scenes.search("brick", by="pixels")
    with pytest.raises(UserError, match="top must be"):
        scenes.search("brick", top=0)


def test_the_disk_is_full(index, photos, monkeypatch):
    before = content(index)
    picture(photos / "9.png", 9)

    def full(*_: object) -> None:
        raise RuntimeError("lance error: LanceError(IO): No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        for table in ("LanceTable",):
            import lancedb.table

            patch.setattr(getattr(lancedb.table, table), "add", full)
        with pytest.raises(UserError, match=r"cannot write there \(No space left on device\)"):
            index.add(photos)
    assert content(index) == before
    assert index.add(photos).new == 1


def test_an_exact_index_relabels_as_segment_labels_to_the_pixel(tmp_path, tiny):
    words = "grass, night sky, brick, wood, green heart, red circle"
    index = opensan.Index(tmp_path / "exact", tiny)
    index.add(SCENES, exact=True)
    for path, segmentation in index.relabel(words, background="sky"):
        expected = tiny.segment(path, words, background="sky")
        assert np.array_equal(segmentation.labels, expected.labels)
        assert np.array_equal(segmentation.confidence, expected.confidence)
    assert index.info()["exact"] and opensan.Index(tmp_path / "exact", tiny).add(SCENES).unchanged == 3
    copy = shutil.copytree(index.folder, tmp_path / "copy")
    (half,) = [file for file in (copy / "images.lance" / "data").iterdir() if file.stat().st_size > 10_000]
    half.write_bytes(half.read_bytes()[:-5_000])
    with pytest.raises(UserError, match="damaged"):
        list(opensan.Index(copy, tiny).relabel(words))


def test_stored_masks_relabel_nearly_alike(scenes):
    words = "grass, night sky, brick, wood, green heart, red circle"
    for path, segmentation in scenes.relabel(words):
        expected = scenes.segmenter.segment(path, words)
        assert (segmentation.labels == expected.labels).mean() > 0.97


def test_an_exact_index_is_made_from_the_start(index, photos):
    with pytest.raises(UserError, match="is no exact index, and can't become one"):
        index.add(photos, exact=True)


def test_relabelled_files_are_those_of_segment(tmp_path, capsys, monkeypatch):
    from opensan.cli import main

    folder, words = tmp_path / "scenes.index", "grass, night sky, brick, wood"
    assert run(capsys, "add", folder, SCENES, "--model", "tiny", "--exact")[0] == 0
    relabelled = run(
        capsys, "relabel", folder, "--words", words, "--out", tmp_path / "a", "--format", "png,overlay,coco"
    )
    assert relabelled[0] == 0 and relabelled[1].endswith(f"3 of 3 images done, results in {tmp_path / 'a'}\n")
    again = run(capsys, "relabel", folder, "--words", words, "--out", tmp_path / "a", "--format", "png,overlay,coco")
    assert "3 of 3 images done, 3 of them earlier" in again[1]
    with pytest.raises(SystemExit):
        main(
            [
                "segment",
                str(SCENES),
                "-m",
                "tiny",
                "-w",
                words,
                "-o",
                str(tmp_path / "b"),
                "--format",
                "png,overlay,coco",
            ]
        )
    files = sorted(path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*") if path.is_file())
    assert len(files) > 9
    for file in files:
        if file.name != "manifest.sqlite":
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_an_image_that_changed_is_not_relabelled(index, photos, tmp_path):
    picture(photos / "0.png", 77)
    paths, stored = index.stored_segmenter()
    with pytest.raises(UserError, match="has changed since it was added"):
        stored.read(paths[0])


def test_answers_are_written_as_a_page_json_and_coco(tmp_path, capsys):
    folder, photos = tmp_path / "scenes.index", tmp_path / "photos"
    shutil.copytree(SCENES, photos)
    assert run(capsys, "add", folder, photos, "--model", "tiny")[0] == 0
    (photos / "court.png").unlink()
    page, plain, coco = (tmp_path / name for name in ("page.html", "answer.json", "found.coco.json"))
    code, out, err = run(capsys, "search", folder, "grass", "--not", "<b>", "--against", "none", "--out", page)
    assert code == 1 and "never read '<b>'" in err
    code, out, err = run(capsys, "search", folder, "grass|green", "--and", "wood", "--out", page)
    assert (code, out.splitlines()[-1]) == (0, f"wrote {page}")
    assert err.count("\n") == 1 and "court.png" in err
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 3 and "grass, and wood</h1>" in text and "<script" not in text
    assert run(capsys, "search", folder, "grass", "--out", plain)[0] == 0
    assert json.loads(plain.read_text())["matches"][0]["score"] > 0.5
    assert run(capsys, "search", folder, "grass", "--out", coco)[0] == 0
    from faster_coco_eval import COCO

    data = COCO(str(coco))
    capsys.readouterr()
    best = data.loadAnns(data.getAnnIds(imgIds=[1]))[0]
    assert data.annToMask(best).sum() == best["area"] > 0.2 * 480 * 640
    assert run(capsys, "search", folder, "grass", "--out", tmp_path / "page.txt")[0] == 2
    code, _, err = run(capsys, "search", folder, "grass", "--out", tmp_path / "missing" / "page.html")
    assert code == 1 and "cannot write there" in err


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    from opensan.cli import main

    with pytest.raises(SystemExit) as caught:
        main(["index", *map(str, arguments)])
    output = capsys.readouterr()
    return caught.value.code or 0, output.out, output.err


def test_the_commands(tmp_path, capsys):
    folder = tmp_path / "scenes.index"
    code, out, err = run(capsys, "add", folder, SCENES, "--model", "tiny")
    assert (code, out) == (0, f"3 new: 3 images in {folder}\n") and "WARN" not in err
    code, out, _ = run(capsys, "add", folder, SCENES / "court.png", "--json")
    assert code == 0 and json.loads(out)["unchanged"] == 1
    code, out, _ = run(capsys, "search", folder, "green heart", "--top", "1")
    assert code == 0 and "playground.png" in out.splitlines()[0] and out.splitlines()[-1] == "1 images, of all 3"
    code, out, _ = run(capsys, "search", folder, "brick", "--not", "green heart", "--against", "none", "--json")
    told = json.loads(out)
    assert (told["not"], told["against"]) == (["green heart"], 0)
    assert told["matches"][0]["regions"][0]["rle"]["size"] == [480, 640]
    assert opensan.Index(folder).segmenter.identity.name == "tiny"  # that of the index
    code, out, _ = run(capsys, "info", folder, "--json")
    assert json.loads(out)["images"] == 3
    assert run(capsys, "remove", folder, SCENES / "court.png")[1] == f"1 removed: 2 images in {folder}\n"
    assert run(capsys, "compact", folder)[0] == 0
    assert run(capsys, "remove", folder)[0] == 2
    code, _, err = run(capsys, "search", folder, "")
    assert code == 1 and err == 'error: an empty query: give a word to search for, such as "zebra crossing"\n'
