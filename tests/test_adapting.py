"""Adaptation to each image at test time: what changes, what stays, and who refuses."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import opensan
from opensan.errors import UserError
from opensan.jobs.folder import ADAPTS_ANEW, FolderRun, plan
from opensan.jobs.tiles import ArrayRaster, Tiling, label_by_tiles
from opensan.lab.scenes import make_scene
from opensan.segmenters import adapting
from opensan.segmenters.adapting import information
from opensan.structures import ImageSizes, Proposals
from opensan.vocabulary import Vocabulary

WORDS = "circle, square, triangle, star, grass, sand, wood, water"


@pytest.fixture(scope="module")
def tiny() -> opensan.Segmenter:
    return opensan.load("tiny", text_cache=False)


def pictures(count: int, size: tuple[int, int] = (64, 64)) -> list[np.ndarray]:
    """Return drawn scenes out of focus: what the model never saw."""
    scenes = [Image.fromarray(make_scene(3, number, size, split="test").image) for number in range(count)]
    return [np.asarray(scene.filter(ImageFilter.GaussianBlur(1.5))) for scene in scenes]


def told(segmenter, encoding, words: str = WORDS) -> float:
    """Return what the pixels' positions tell of their words, in nats."""
    text = segmenter.text.classifier(Vocabulary.parse(words))
    arrays = [torch.as_tensor(encoding[name]).unsqueeze(0) for name in ("mask_logits", "mask_embeddings")]
    with torch.no_grad():
        return float(information(segmenter.model, Proposals(*arrays), text, encoding.sizes))


def test_model_itself_stays_as_it_was(tiny):
    (image,) = pictures(1)
    before, state = tiny.encode(image), {name: value.clone() for name, value in tiny.model.clip.named_parameters()}
    adapted = tiny.adapting(WORDS)
    weights = {name: value.clone() for name, value in adapted.model.named_parameters()}
    changed = adapted.encode(image)
    after = tiny.encode(image)
    for name in ("mask_logits", "mask_embeddings"):
        assert torch.equal(before[name], after[name])
        assert not torch.equal(before[name], changed[name])
    assert (tiny.segment(before, WORDS).labels == tiny.segment(after, WORDS).labels).all()
    assert all(torch.equal(value, weights[name]) for name, value in adapted.model.named_parameters())
    for name, value in tiny.model.clip.named_parameters():
        assert value.is_mkldnn or torch.equal(value, state[name])


def test_each_image_is_surer_and_begins_anew(tiny):
    first, second = pictures(2)
    adapted = tiny.adapting(WORDS)
    alone = adapted.encode(second)
    both = adapted.encode([first, second])
    assert torch.equal(alone["mask_logits"], both[1]["mask_logits"])
    for image, encoding in zip((first, second), both, strict=True):
        assert told(tiny, encoding) > told(tiny, tiny.encode(image))


def test_information_is_that_of_sure_and_different_pixels(tiny):
    text = tiny.text.classifier(Vocabulary.parse("circle, square"))
    rows = text.rows.detach()
    masks = torch.full((1, 2, 4, 4), -30.0)
    masks[0, 0, :2], masks[0, 1, 2:] = 30.0, 30.0
    sizes = ImageSizes(image=(64, 64), network=(64, 64), padded=(64, 64))

    def found(*words: int) -> float:
        proposals = Proposals(masks, rows[list(words)].unsqueeze(0))
        return float(information(tiny.model, proposals, text, sizes))

    assert found(0, 1) > 0.1  # each half is another word
    assert abs(found(0, 0)) < 1e-4  # all is one word, however sure
    padded = replace(sizes, network=(32, 64))
    assert abs(float(information(tiny.model, Proposals(masks, rows[[0, 1]].unsqueeze(0)), text, padded))) < 1e-4


def test_keep_goes_on_until_reset(tiny):
    first, second = pictures(2)
    adapted = tiny.adapting(WORDS, "keep")
    alone = adapted.encode(second)
    adapted.reset()
    adapted.encode(first)
    after_first = adapted.encode(second)
    assert not torch.equal(alone["mask_logits"], after_first["mask_logits"])
    adapted.reset()
    assert torch.equal(alone["mask_logits"], adapted.encode(second)["mask_logits"])


def test_threads_get_what_one_gets(tiny):
    images = pictures(2, (32, 48))
    adapted = tiny.adapting(WORDS)
    alone = [adapted.encode(image)["mask_logits"] for image in images]
    found: dict[int, torch.Tensor] = {}

    def encode(number: int) -> None:
        with torch.inference_mode():  # a caller's mode does not reach the adaptation
            found[number] = adapted.encode(images[number % 2])["mask_logits"]

    threads = [threading.Thread(target=encode, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], alone[number % 2]) for number in range(4))


def test_steps_without_finite_gradients_are_left_out(tiny, monkeypatch):
    (image,) = pictures(1, (32, 32))
    adapted = tiny.adapting(WORDS)
    monkeypatch.setattr(adapting, "information", lambda *arguments: information(*arguments) * float("nan"))
    encoding = adapted.encode(image)
    assert encoding.is_finite
    assert torch.allclose(encoding["mask_logits"], tiny.encode(image)["mask_logits"], atol=1e-3)


def test_identity_says_what_it_adapted_to(tiny):
    (image,) = pictures(1, (32, 32))
    others = [tiny.adapting(*given) for given in ((WORDS,), (WORDS, "keep"), ("sky, sea",))]
    assert len({str(one.identity) for one in (tiny, *others)}) == 4
    with_rest = tiny.adapting(tiny.with_rest(Vocabulary.parse(WORDS)))  # the rest is no word to be sure of
    assert with_rest.identity == others[0].identity
    encoding = others[0].encode(image)
    assert encoding.model.startswith("tiny-adapted-")
    relabelled = others[0].segment(encoding, WORDS).relabel("sky, sea")  # words may change afterwards
    assert relabelled.names == ["sky", "sea"]
    for segmenter in (tiny, *others[1:]):
        with pytest.raises(UserError, match="was made by model tiny-adapted"):
            segmenter.segment(encoding, WORDS)
    with pytest.raises(UserError, match="was made by model tiny-"):
        others[0].segment(tiny.encode(image), WORDS)


def test_folders_are_labelled_again_and_interrupted_streams_say_so(tiny, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, image in enumerate(pictures(2, (32, 32))):
        Image.fromarray(image).save(photos / f"{number}.png")
    jobs = plan(sorted(photos.iterdir()), [photos])
    words = Vocabulary.parse(WORDS)

    def pending(segmenter, jobs) -> tuple[int, list[str]]:
        with FolderRun(segmenter, words, jobs, tmp_path / "out", ["png"]) as run:
            count = len(run.pending)
            list(run.results())
            return count, run.notes

    assert pending(tiny, jobs)[0] == 2
    assert pending(tiny.adapting(words), jobs)[0] == 2
    assert pending(tiny.adapting(words), jobs)[0] == 0
    keeping = tiny.adapting(words, "keep")
    assert pending(keeping, jobs[:1])[0] == 1
    count, notes = pending(keeping, jobs)
    assert count == 1
    assert ADAPTS_ANEW in notes


def test_those_that_cannot_adapt_say_so_in_one_line(tiny, tmp_path):
    adapted = tiny.adapting(WORDS)
    with pytest.raises(UserError, match="only a SAN as torch runs it"):
        adapted.adapting(WORDS)
    with pytest.raises(UserError, match="only a SAN as torch runs it"):
        opensan.load("two-stage:tiny", text_cache=False).adapting(WORDS)
    with pytest.raises(UserError, match="at least two"):
        tiny.adapting("road")
    with pytest.raises(UserError, match="'never' is not one of each, keep"):
        tiny.adapting(WORDS, "never")
    with pytest.raises(UserError, match="float32 alone"):
        opensan.load("tiny", dtype="bfloat16", text_cache=False).adapting(WORDS)
    (tmp_path / "photos").mkdir()
    Image.fromarray(pictures(1)[0]).save(tmp_path / "photos/a.png")
    with pytest.raises(UserError, match=r"an index.*adapts to each image"):
        opensan.Index(tmp_path / "index", model=adapted).add(tmp_path / "photos")
    raster = ArrayRaster(pictures(1)[0])
    with pytest.raises(UserError, match=r"tiles of one image.*adapts to each image"):
        next(label_by_tiles(adapted, raster, Vocabulary.parse(WORDS), Tiling.plan(raster.size, 64)))
    pytest.importorskip("fastapi")
    from opensan.serve.app import create_app

    with pytest.raises(UserError, match=r"a service.*adapts to each image"):
        create_app(adapted)


def test_calibration_is_left_out_with_a_warning(tiny):
    calibrated = opensan.load("tiny", text_cache=False)
    calibrated.calibration = object()  # any: only its absence is of interest
    with pytest.warns(UserWarning, match="calibration"):
        assert calibrated.adapting(WORDS).calibration is None
    assert calibrated.calibration is not None


def test_command_line(run, tmp_path, model_folder):
    for number, image in enumerate(pictures(2, (32, 32))):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    images, out = sorted(tmp_path.glob("*.png")), tmp_path / "out"
    asked = ("--words", WORDS, "--model", model_folder, "--out", out, "--format", "png,json")
    plain = {}
    for options in ((), ("--adapt", "each"), ("--adapt", "keep")):
        code, stdout, stderr = run("segment", *images, *asked, *options)
        assert code == 0, stderr
        assert "2 of 2 images done" in stdout
        assert "earlier" not in stdout
        plain[options] = [(out / f"{number}.segments.json").read_text() for number in range(2)]
    assert len({answers[1] for answers in plain.values()}) == 3
    assert '"adapted' not in plain[()][0]
    assert "-adapted-" in plain["--adapt", "each"][0]


def test_command_line_refuses(run, tmp_path):
    for given, message in (
        (("segment", "-", "--lines", "--adapt", "each"), "leave out --lines"),
        (("segment", "a", "b", "--words", "a,b", "--adapt", "always"), "'always' is not one of"),
        (("segment", "a", "--words", "a,b", "--adapt", "each", "--on", "ray", "--workers", "2"), "leave out --adapt"),
        (("eval", tmp_path, "--adapt", "each", "--tta"), "leave out --tta"),
    ):
        code, _, stderr = run(*given)
        assert code == 2
        assert message in stderr.replace("\n", " ")
