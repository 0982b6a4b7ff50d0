"""Segments: MaskFormer's rules against the same rules written out plainly, and what reads them."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

import opensan
from opensan.assemble.interpolation import mask_bands
from opensan.assemble.kinds import KindOfWord, word_kinds
from opensan.assemble.segments import SegmentRules, find_segments
from opensan.cli import main
from opensan.errors import UserError
from opensan.files import ASSETS
from opensan.structures import ImageSizes
from opensan.vocabulary import Vocabulary

from .test_any_segmenter import WORDS, ColourSegmenter, stripes

SCENE = ASSETS / "scenes" / "playground.png"
SIZES = (
    ImageSizes(image=(61, 90), network=(48, 71), padded=(64, 96)),
    ImageSizes(image=(40, 31), network=(64, 50), padded=(64, 64)),
)


def plain_segments(masks, probabilities, kinds, rules):
    """Return (word, proposal of most pixels, mask) of each segment: MaskFormer's loop over proposals, at full size."""
    names = list(kinds)
    nothing = 1 - probabilities.sum(1)
    kept = [
        q for q in range(len(masks)) if probabilities[q].max() > nothing[q] and probabilities[q].max() > rules.score
    ]
    if not kept:
        return []
    weighed = np.stack([masks[q] * probabilities[q].max() for q in kept])
    winner = weighed.argmax(0)
    regions: dict[object, np.ndarray] = {}
    for index, q in enumerate(kept):
        word = int(probabilities[q].argmax())
        won, own = (winner == index).sum(), (masks[q] >= rules.mask).sum()
        if own == 0 or won < rules.overlap * own or word >= len(names):
            continue
        mask = (winner == index) & (masks[q] >= rules.mask)
        together = rules.parts or kinds[names[word]].kind == "stuff"
        key = (word, None if together else q)
        regions[key] = regions.get(key, np.zeros_like(mask)) | mask
    found = []
    for (word, _), mask in regions.items():
        pieces = [mask]
        if rules.parts and kinds[names[word]].kind == "thing":
            pieces = [piece for piece in flooded(mask) if piece.sum() >= max(1, rules.smallest * mask.size)]
        for piece in pieces:
            if piece.any():
                most = np.bincount(winner[piece]).argmax()
                found.append((names[word], probabilities[kept[most]].max(), piece))
    return found


def flooded(mask):
    """Yield the parts of a mask that are connected along sides and corners, by walking from pixel to pixel."""
    left = set(zip(*np.nonzero(mask), strict=True))
    while left:
        piece, todo = np.zeros_like(mask), [left.pop()]
        while todo:
            y, x = todo.pop()
            piece[y, x] = True
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            todo += near
        yield piece


@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("seed", range(20))
def test_segments_are_those_of_the_plain_loop(seed, parts):
    rng = np.random.default_rng(seed)
    sizes = SIZES[seed % 2]
    queries, words = int(rng.integers(1, 12)), 4
    grid = tuple(side // 8 for side in sizes.padded)
    mask_logits = (rng.standard_normal((queries, *grid)) * 4).astype(np.float32)
    logits = rng.standard_normal((queries, words + 2)) * rng.uniform(0.5, 5)
    probabilities = np.exp(logits)
    probabilities = (probabilities / probabilities.sum(1, keepdims=True))[:, :-1].astype(np.float32)
    # The last word is a background word.
    kinds = {f"w{k}": KindOfWord("stuff" if k % 2 else "thing", "asked") for k in range(words)}
    rules = SegmentRules(
        score=rng.choice([0, 0.4]), mask=rng.choice([0.3, 0.5]), overlap=rng.choice([0, 0.4, 0.8]), parts=parts,
        smallest=rng.choice([0, 0.004]),
    )  # fmt: skip
    found = find_segments(mask_logits, probabilities, sizes, kinds, rules)
    expected = plain_segments(mask_bands(mask_logits, sizes)(slice(None)), probabilities, kinds, rules)

    def key(word, score, mask):
        return word, round(float(score), 5), mask.tobytes()

    assert sorted(key(s.word, s.score, s.mask) for s in found) == sorted(key(*each) for each in expected)
    assert [s.id for s in found] == list(range(1, len(found) + 1))
    for segment in found:
        left, top, width, height = segment.box
        rows, columns = np.nonzero(segment.mask)
        assert (left, top, left + width - 1, top + height - 1) == (
            columns.min(),
            rows.min(),
            columns.max(),
            rows.max(),
        )
        assert segment.area == segment.mask.sum() and segment.kind == kinds[segment.word].kind


def test_flags_go_before_lists_and_lists_before_the_default():
    vocabulary = Vocabulary.parse("sky, car, table, wall, puddle, vehicle|truck, road", background="tree")
    kinds = {word: (kind.kind, kind.because) for word, kind in word_kinds(vocabulary, things=["road"]).items()}
    assert kinds == {
        "sky": ("stuff", "COCO and ADE20K"),
        "car": ("thing", "COCO and ADE20K"),
        "table": ("thing", "ADE20K"),  # stuff in COCO-Stuff: a thing in one of the lists is a thing
        "wall": ("stuff", "COCO and ADE20K"),
        "puddle": ("thing", "no list has it"),
        "vehicle": ("thing", "COCO and ADE20K"),
        "road": ("thing", "asked"),
    }


@pytest.fixture(scope="module")
def tiny():
    return opensan.load("tiny", text_cache=False)


def test_a_segmentation_has_segments_and_writes_them(tiny, tmp_path):
    rules = SegmentRules(stuff=("night sky", "brick"))
    segmentation = tiny.segment(SCENE, "night sky, brick, red circle, green heart", segments=rules)
    segments = segmentation.segments
    assert [segment.word for segment in segments.of("brick")] == ["brick"] and len(segments) >= 4
    assert "connected parts" in segments.to_dict()["objects_by"]
    segmentation.save(tmp_path, "it", ["panoptic", "boxes"])
    numbers = np.asarray(Image.open(tmp_path / "it.panoptic.png")).astype(int) @ [1, 256, 65536]
    assert (numbers == segments.ids).all()
    record = json.loads((tmp_path / "it.boxes.json").read_text())
    for entry, segment in zip(record["segments"], segments, strict=True):
        assert (coco_mask.decode(entry["rle"]) == segment.mask).all()
        assert entry["box"] == coco_mask.toBbox(entry["rle"]).tolist()


def test_supervision_opens_boxes_and_masks(tiny):
    supervision = pytest.importorskip("supervision")
    segments = tiny.segment(SCENE, "night sky, brick, red circle", segments=True).segments
    masks = np.stack([segment.mask for segment in segments])
    boxes = supervision.mask_to_xyxy(masks)
    expected = [(x, y, x + width - 1, y + height - 1) for x, y, width, height in (s.box for s in segments)]
    assert boxes.tolist() == [list(box) for box in expected]
    assert len(supervision.Detections(xyxy=boxes, mask=masks)) == len(segments)


def test_labels_are_the_same_with_and_without_segments(tiny):
    plain = tiny.segment(SCENE, "night sky, brick, red circle")
    assert (plain.labels == tiny.segment(SCENE, "night sky, brick, red circle", segments=True).labels).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": 1.5}, "'score' must be from 0 to 1, not 1.5"),
        ({"mask": -0.1}, "'mask' must be from 0 to 1, not -0.1"),
        ({"overlap": "much"}, "'overlap' must be from 0 to 1, not 'much'"),
        ({"stuff": ["sky"], "things": ["car", "sky"]}, "'sky' can't be both stuff and thing"),
        ({"stuff": "sky"}, "'stuff' must be a list of words"),
    ],
)
def test_wrong_rules_are_refused_in_one_line(settings, message):
    with pytest.raises(UserError) as caught:
        SegmentRules(**settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_marked_word_that_is_not_asked_for_is_refused_before_the_work(tiny):
    with pytest.raises(UserError, match="'brik' is marked as stuff but is no word that is asked for; did you mean"):
        tiny.segment("no such file.png", "brick", segments=SegmentRules(stuff=("brik",)))


def test_a_model_without_proposals_says_so():
    segmentation = ColourSegmenter().segment(stripes(), WORDS)
    with pytest.raises(UserError, match="segments need a model with mask proposals, and colours has none"):
        _ = segmentation.segments


def run(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    output = capsys.readouterr()
    return caught.value.code or 0, output.out, output.err


def test_the_command_writes_and_tells(tmp_path, capsys):
    words = ["-w", "night sky, brick", "-m", "tiny", "-o", str(tmp_path)]
    code, out, _ = run(["segment", str(SCENE), *words, "--format", "panoptic,boxes", "--stuff", "brick"], capsys)
    assert code == 0 and "stuff (asked)" in out and "thing (no list has it)" in out and "connected parts" in out
    assert (tmp_path / "playground.panoptic.png").exists() and (tmp_path / "playground.boxes.json").exists()
    code, out, _ = run(["segment", str(SCENE), *words, "--format", "boxes", "--objects", "proposals", "--json"], capsys)
    assert code == 0 and json.loads(out)["objects_by"].startswith("proposals")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "boxes", "--least-overlap", "1.5"], "must be from 0 to 1"),
        (["--format", "boxes", "--stuff", "brick", "--things", "brick"], "both stuff and thing"),
        (["--stuff", "brick"], "need a --format that is made of objects: panoptic, boxes, coco-instances"),
    ],
)
def test_wrong_options_end_the_command_before_the_work(options, message, tmp_path, capsys):
    code, out, error = run(
        ["segment", str(SCENE), "-w", "brick, sand", "-m", "tiny", "-o", str(tmp_path / "o"), *options], capsys
    )
    assert code == 2 and message in error and not out and not (tmp_path / "o").exists()


def test_a_folder_with_other_rules_is_done_again(tmp_path, capsys):
    command = ["segment", str(SCENE.parent), "-w", "night sky, brick", "-m", "tiny", "-o", str(tmp_path)]
    command += ["--format", "boxes"]
    assert run(command, capsys)[0] == 0
    before = (tmp_path / "playground.boxes.json").read_text()
    assert "3 of them earlier" in run(command, capsys)[1]
    assert "earlier" not in run([*command, "--stuff", "brick"], capsys)[1]
    assert (tmp_path / "playground.boxes.json").read_text() != before
