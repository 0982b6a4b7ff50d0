"""The object a user holds: inputs, batches, relabelling, saved encodings, threads."""

import io
import json
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_overloads

import numpy as np
import pytest
import torch
from PIL import Image, ImageShow
from safetensors.numpy import save_file

import opensan
from opensan.checkpoints import save_folder
from opensan.devices import checked_device
from opensan.errors import UserError
from opensan.segmenters.base import Segmenter
from opensan.segmenters.results import Encoding, Segmentation
from opensan.segmenters.san import SanSegmenter
from opensan.vocabulary import UNLABELLED

WORDS = ["sea", "hair drier", "zebra crossing", "bookcase"]


@pytest.fixture(scope="session")
def folder(small_model, tmp_path_factory):
    return save_folder(small_model, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def san(folder) -> SanSegmenter:
    return opensan.load(folder, text_cache=False)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blurred noise: regions of some size, as photographs have."""
    noise = np.random.default_rng(seed).integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def test_the_result_says_what_it_is(san):
    image = picture(100, 140)
    seg = san.segment(image, WORDS)
    assert seg.labels.shape == (100, 140) and seg.labels.dtype == np.int32
    assert seg.names == WORDS
    assert seg.confidence.shape == (100, 140) and seg.confidence.dtype == np.float32
    assert seg.confidence.min() >= 0 and seg.confidence.max() <= 1
    assert list(seg.areas) == WORDS and sum(seg.areas.values()) == pytest.approx(1)
    for index, name in enumerate(WORDS):
        assert seg.areas[name] == pytest.approx((seg.labels == index).mean())
    assert np.array_equal(seg.image, image)


def test_every_kind_of_input_gives_the_same_answer(san, tmp_path):
    image = picture(60, 80)
    file = tmp_path / "street.png"
    Image.fromarray(image).save(file)
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    expected = san.segment(image, WORDS).labels
    for source in (file, str(file), content.getvalue(), Image.fromarray(image), torch.from_numpy(image.copy())):
        assert np.array_equal(san.segment(source, WORDS).labels, expected)


def test_type_checkers_know_that_one_image_gives_one_answer():
    for method, answer in ((Segmenter.encode, Encoding), (Segmenter.segment, Segmentation)):
        of_many, of_one = [overload.__annotations__ for overload in get_overloads(method)]
        assert (of_one["return"], of_many["return"]) == (answer, list[answer])
        assert of_many["images"] == list[Any] | tuple[Any, ...]  # first: without torch, ImageSource may be anything


def test_a_result_shows_itself_in_a_line_and_in_a_notebook(san):
    seg = san.segment(np.full((40, 60, 3), 128, np.uint8), ["road", "sky"])
    first = max(seg.areas, key=seg.areas.get)
    assert repr(seg).startswith(f"<Segmentation of 60x40: {first} ") and len(repr(seg)) < 80
    assert repr(seg.encoding) == f"<Encoding of an image of 60x40 by {san.identity.encodings}>"
    with Image.open(io.BytesIO(seg._repr_png_())) as shown:
        assert np.array_equal(np.asarray(shown), np.asarray(seg.overlay()))


def test_results_are_compared_by_identity(san):
    """Comparing arrays has no one answer, so that `in` a list of results would raise."""
    first, second = san.segment([picture(40, 60), picture(40, 60)], WORDS)
    assert second in [first, second] and first not in [second] and len({first, second, first}) == 2


def test_a_pickled_result_is_complete_but_for_the_model(san, tmp_path):
    image = picture(60, 80)
    seg = san.segment(image, WORDS, background=["other"])
    data = pickle.dumps(seg)
    assert len(data) < 40 * image.size  # the model stays behind
    copy = pickle.loads(data)
    assert pickle.loads(pickle.dumps(replace(seg, data={"depth": image}))).data["depth"].shape == image.shape
    assert np.array_equal(copy.labels, seg.labels) and np.array_equal(copy.confidence, seg.confidence)
    assert copy.names == seg.names and copy.areas == seg.areas and copy.vocabulary == seg.vocabulary
    written, expected = copy.save(tmp_path / "copy"), seg.save(tmp_path / "original")
    assert {kind: path.read_bytes() for kind, path in written.items()} == {
        kind: path.read_bytes() for kind, path in expected.items()
    }
    with pytest.raises(ValueError, match="no model: use a model"):
        copy.relabel(["road"])
    assert np.array_equal(san.segment(copy.encoding, ["road", "sky"]).labels, seg.relabel(["road", "sky"]).labels)


def test_relabel_runs_neither_vit(san):
    seg = san.segment(picture(90, 90), WORDS)
    calls = []
    towers = (san.model.clip.visual, san.model.side_adapter)
    hooks = [m.register_forward_hook(lambda *_: calls.append(1)) for tower in towers for m in tower.modules()]
    try:
        again = seg.relabel(["asphalt", "vehicle", "sky"])
        assert calls == []
        san.segment(picture(90, 90), WORDS)
        assert calls
    finally:
        for hook in hooks:
            hook.remove()
    assert again.names == ["asphalt", "vehicle", "sky"]
    assert np.array_equal(again.labels, san.segment(picture(90, 90), ["asphalt", "vehicle", "sky"]).labels)


def test_mixed_sizes_in_a_batch_answer_as_one_by_one(san):
    images = [picture(90, 120, 1), picture(50, 50, 2), picture(120, 90, 3), picture(90, 120, 4), picture(31, 200, 5)]
    together = san.segment(images, WORDS, batch_size=2)
    assert [seg.labels.shape for seg in together] == [image.shape[:2] for image in images]
    for image, seg in zip(images, together, strict=True):
        alone = san.segment(image, WORDS)
        assert (alone.labels != seg.labels).mean() < 1e-3  # rounding decides ties
        np.testing.assert_allclose(alone.confidence, seg.confidence, atol=1e-4)


def test_background_words_absorb_pixels(san):
    image = picture(80, 80)
    plain = san.segment(image, WORDS)
    # the same words, one of them declared background: its pixels, and no others, become unlabelled
    winner = plain.names[int(np.bincount(plain.labels.ravel()).argmax())]
    others = [word for word in WORDS if word != winner]
    absorbed = san.segment(image, others, background=[winner])
    assert absorbed.names == others
    expected = np.array([UNLABELLED if n == winner else others.index(n) for n in plain.names])[plain.labels]
    assert (absorbed.labels == expected).mean() > 0.999
    assert sum(absorbed.areas.values()) == pytest.approx(1 - plain.areas[winner], abs=1e-3)


def test_confidence_is_computed_when_asked(san, tmp_path, monkeypatch):
    words, background = WORDS[:2], WORDS[2:]
    seg = san.segment(picture(64, 64), words, background=background)
    asked, compute = [], SanSegmenter.confidence
    monkeypatch.setattr(
        SanSegmenter,
        "confidence",
        lambda self, of: asked.append(1) or compute(self, of),
    )
    seg.save(tmp_path, formats=("png", "overlay"))
    assert not asked
    seg.save(tmp_path, formats=("json",))
    assert np.array_equal(seg.confidence, seg.confidence) and len(asked) == 1
    # a background word's pixels have its confidence, the same as if it were any word
    plain = san.segment(picture(64, 64), words + background)
    np.testing.assert_allclose(seg.confidence, plain.confidence, atol=1e-6)
    assert np.array_equal(plain.labels, seg.winners)


def test_an_encoding_can_be_kept(san, tmp_path):
    image = picture(70, 110)
    encoding = san.encode(image)
    encoding.save(tmp_path / "street.encoding")
    loaded = Encoding.load(tmp_path / "street.encoding")
    assert np.array_equal(loaded.image, image) and loaded.sizes == encoding.sizes
    assert np.array_equal(san.segment(loaded, WORDS).labels, san.segment(image, WORDS).labels)
    mixed = san.segment([loaded, picture(50, 50)], WORDS)
    assert [seg.labels.shape for seg in mixed] == [(70, 110), (50, 50)]


def test_an_encoding_of_version_0_1_0_is_read(san, tmp_path):
    """Such a file holds the two arrays of SAN by name, the image, and the sizes in its metadata."""
    encoding = san.encode(picture(50, 70))
    sizes = {name: list(getattr(encoding.sizes, name)) for name in ("image", "network", "padded")}
    tensors = {name: encoding[name].numpy() for name in ("mask_logits", "mask_embeddings")} | {"image": encoding.image}
    about = json.dumps({"model": encoding.model, "sizes": sizes})
    save_file(tensors, tmp_path / "old.encoding", metadata={"opensan": about})
    loaded = Encoding.load(tmp_path / "old.encoding")
    assert set(loaded.arrays) == {"mask_logits", "mask_embeddings"} and np.array_equal(loaded.image, encoding.image)
    assert np.array_equal(san.segment(loaded, WORDS).labels, san.segment(encoding, WORDS).labels)


def test_a_foreign_or_damaged_encoding_is_refused(san, small_model, tmp_path):
    encoding = san.encode(picture(60, 60))
    stranger = replace(encoding, model="other-model")
    with pytest.raises(ValueError, match="made by model other-model"):
        san.segment(stranger, WORDS)
    enormous = replace(encoding.sizes, image=(1_000_000, 1_000_000))
    path = replace(encoding, sizes=enormous, image=None).save(tmp_path / "enormous.encoding")
    with pytest.raises(ValueError, match="contradict each other"):
        Encoding.load(path)
    wide = replace(encoding.sizes, network=(10**6, 10**6), padded=(10**6, 10**6))
    for name, sizes in (("huge", wide), ("upside-down", replace(encoding.sizes, network=(0, 64)))):
        path = replace(encoding, sizes=sizes).save(tmp_path / name)
        with pytest.raises(ValueError, match="contradict each other"):
            Encoding.load(path)
    fewer = {"mask_logits": encoding.mask_logits, "mask_embeddings": encoding.mask_embeddings[1:]}
    for arrays in (fewer, {"mask_logits": encoding.mask_logits}, {"features": encoding.mask_logits}):
        path = replace(encoding, arrays=arrays).save(tmp_path / "others")
        with pytest.raises(ValueError, match="holds no mask proposals") as caught:
            san.segment(Encoding.load(path), WORDS)
        assert "\n" not in str(caught.value)
    path = encoding.save(tmp_path / "x.encoding")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a saved encoding"):
        Encoding.load(path)
    with pytest.raises(ValueError, match="not a saved encoding"):
        Encoding.load(tmp_path / "absent")


def test_threads_share_one_object(san):
    images = [picture(64, 96, seed) for seed in range(6)]
    vocabularies = [WORDS, WORDS[:2], ["sky", "grass", "road"]] * 2
    expected = [san.segment(i, w).labels for i, w in zip(images, vocabularies, strict=True)]
    fresh = SanSegmenter(san.model, text_cache=False)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda pair: fresh.segment(*pair).labels, zip(images, vocabularies, strict=True)))
    for one, other in zip(expected, found, strict=True):
        assert (one != other).mean() < 1e-3


def test_an_encoding_keeps_no_more_than_its_own_part_of_a_batch(san):
    for encoding in san.encode([picture(64, 96, seed) for seed in range(3)], batch_size=3):
        for tensor in (encoding.mask_logits, encoding.mask_embeddings):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_number_formats_that_the_caller_has_set_change_nothing(san):
    image = picture(64, 96)
    expected = san.segment(image, WORDS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = san.segment(image, WORDS)
        assert np.array_equal(found.confidence, expected.confidence)
    assert np.array_equal(found.labels, expected.labels)
    torch.set_default_dtype(torch.float64)
    try:
        found = san.segment(image, WORDS)
        assert np.array_equal(found.confidence, expected.confidence)
    finally:
        torch.set_default_dtype(torch.float32)
    assert np.array_equal(found.labels, expected.labels)


def test_bfloat16_answers_nearly_the_same(folder, san):
    narrow = opensan.load(folder, dtype="bfloat16", text_cache=False)
    image = picture(96, 96)
    assert narrow.model.side_adapter.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    agreement = (narrow.segment(image, WORDS).labels == san.segment(image, WORDS).labels).mean()
    assert agreement > 0.8


def test_random_weights_warn_and_repeat():
    with pytest.warns(UserWarning, match="answers mean nothing"):
        first = opensan.load("san-vit-b16", random_weights=3, text_cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = opensan.load("san-vit-b16", random_weights=3, text_cache=False)
    assert first.identity == second.identity
    weight = "side_adapter.blocks.3.attn.qkv.weight"
    assert torch.equal(*(san.model.state_dict()[weight].to_dense() for san in (first, second)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "no-such-model"}, "no model 'no-such-model'"),
        ({"source": "no-such-preset", "random_weights": 0}, "no preset 'no-such-preset'"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"dtype": "int4"}, "dtype 'int4'"),
        ({"speed": "warp"}, "speed 'warp'"),
        (
            {"source": Path(__file__).parent},
            "tests.config.json: does not exist; a model is weights with their config.json",
        ),
    ],
)
def test_wrong_arguments_are_one_line(folder, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        opensan.load(**{"source": folder, **arguments})
    assert "\n" not in str(error.value)


def test_a_device_that_is_not_there_is_named_in_a_short_line(san, monkeypatch):
    def without(*_, **__):
        raise NotImplementedError("Could not run it with the 'MPS' backend. This could be because [ten more lines]")

    monkeypatch.setattr(torch, "empty", without)
    with pytest.raises(ValueError) as error:
        checked_device("mps")
    assert str(error.value) == "device 'mps' cannot be used here (Could not run it with the 'MPS' backend)"


def test_calls_that_cannot_be_meant_are_one_line(san, tmp_path):
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        san.segment([picture(40, 60)], WORDS, batch_size=0)
    with pytest.raises(ValueError, match=r"formats must be a list, such as \['png', 'json'\], not 'png'"):
        san.segment(picture(40, 60), WORDS).save(tmp_path, formats="png")


def test_a_mask_by_word(san):
    seg = san.segment(picture(60, 80), WORDS)
    for index, word in enumerate(WORDS):
        assert seg[word].dtype == bool and np.array_equal(seg[word], seg.labels == index)
        assert np.array_equal(seg.mask(word), seg[word]) and word in seg
    with pytest.raises(
        UserError, match=r"^this segmentation has no word 'zebra crosing'; did you mean 'zebra crossing'\?$"
    ):
        seg["zebra crosing"]
    with pytest.raises(UserError, match="no word 'xyz': its words are 'sea', 'hair drier'"):
        seg["xyz"]
    with pytest.raises(UserError, match="no word 0"):
        seg[0]


def test_files_of_results_have_the_image_s_name(san, tmp_path):
    images = [tmp_path / "left.png", tmp_path / "right.jpg"]
    for seed, path in enumerate(images):
        Image.fromarray(picture(60, 80, seed)).save(path)
    for seg in san.segment([images[0], Image.open(images[1])], WORDS):
        seg.save(tmp_path / "out", formats=["png"])
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["left.labels.png", "right.labels.png"]
    kept = Encoding.load(san.encode(str(images[0])).save(tmp_path / "kept"))
    assert kept.stem == san.segment(kept, WORDS).relabel(["sky"]).encoding.stem == "left"
    for source in (picture(60, 80), images[0].read_bytes()):
        (path,) = san.segment(source, WORDS).save(tmp_path, formats=["png"]).values()
        assert path.name == "segmentation.labels.png"
    (path,) = san.segment(images[0], WORDS).save(tmp_path, "mine", formats=["png"]).values()
    assert path.name == "mine.labels.png"


def test_a_segmentation_as_plain_data_is_its_json_file(san, tmp_path):
    seg = san.segment(picture(60, 80), WORDS)
    written = json.loads(seg.save(tmp_path, formats=["json"])["json"].read_text())
    assert json.loads(json.dumps(seg.to_dict())) == written


def test_show_opens_the_overlay_or_says_that_nothing_can(san, monkeypatch):
    seg, shown = san.segment(picture(60, 80), WORDS), []

    class Viewer(ImageShow.Viewer):
        def show(self, image, **options):
            shown.append(image)
            return 1

    monkeypatch.setattr(ImageShow, "_viewers", [Viewer()])
    seg.show()
    assert np.array_equal(shown[0], seg.overlay())
    monkeypatch.setattr(ImageShow, "_viewers", [])
    with pytest.raises(UserError, match="no program that shows pictures"):
        seg.show()


def test_a_segmenter_says_what_it_is(san):
    halves = f"image half {san.identity.image[:12]}, text half {san.identity.text[:12]}"
    assert repr(san) == f"<SanSegmenter {san.identity.name} on {san.device}, exact: {halves}>"


def test_completion_offers_all_that_the_package_has():
    assert set(opensan.__all__) <= set(dir(opensan))
    for name in opensan.__all__:
        assert getattr(opensan, name) is not None
