"""SANs around each kind of encoder are exported, and answer without torch as with it."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import opensan

pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

from opensan.checkpoints import build_empty
from opensan.config import ModelConfig
from opensan.errors import UserError
from opensan.export import check, export, formats
from opensan.export.traced import graphs
from opensan.segmenters.exported.manifest import ExportManifest
from opensan.segmenters.exported.requirements import OWN_TOKENIZER

from .encoders import CLIPS, small_san

WORDS = "sky,grass,road"
IN_SECONDS = ("efficientnet_lite", "siglip")
"""The kinds that any run of the tests exports: a ConvNet, and a tower with padded prompts and its own tokenizer."""


@pytest.fixture(
    scope="module",
    params=[name if name in IN_SECONDS else pytest.param(name, marks=pytest.mark.slow) for name in CLIPS],
)
def pair(request, tmp_path_factory):
    """A small model of a kind, and the folder that it was exported to."""
    model = small_san(request.param)
    folder = tmp_path_factory.mktemp("kinds") / "exported"
    assert export(model, folder)[1].passed
    return model, folder


def labels(segmenter) -> np.ndarray:
    return segmenter.segment(check.SCENE, WORDS, background=["the"]).winners


def test_labels_are_those_of_the_model(pair):
    """And what they are made of: a model of random weights may give one word to all pixels."""
    model, folder = pair
    segmenters = opensan.SanSegmenter(model, text_cache=False), opensan.load(folder, threads=1, text_cache=False)
    expected, found = (segmenter.segment(check.SCENE, WORDS, background=["the"]) for segmenter in segmenters)
    assert (found.winners == expected.winners).mean() > 0.999
    np.testing.assert_allclose(found.confidence, expected.confidence, atol=1e-4)
    for name in ("mask_logits", "mask_embeddings"):
        truth = np.asarray(expected.encoding[name])
        assert np.ptp(truth) > 0.1
        assert np.abs(np.asarray(found.encoding[name]) - truth).max() < 1e-4 * np.abs(truth).max()


def test_text_rows_are_those_of_the_model(pair):
    """Of a word that the export never saw, and of words embedded together."""
    model, folder = pair
    exported, own = (
        one.text.rows
        for one in (opensan.load(folder, threads=1, text_cache=False), opensan.SanSegmenter(model, text_cache=False))
    )
    for words in ("road", "a sky, the grass, a road of grass, photo"):
        vocabulary = opensan.Vocabulary.parse(words)
        np.testing.assert_allclose(exported(vocabulary), own(vocabulary), atol=1e-5)


def test_int8_answers_alike(pair, tmp_path):
    model, whole = pair
    folder = shutil.copytree(whole, tmp_path / "int8")
    for path in folder.glob("*.onnx"):
        formats.convert(path, "onnx", "int8")
    manifest = ExportManifest.model_validate_json((folder / "export.json").read_text())
    (folder / "export.json").write_text(manifest.model_copy(update={"dtype": "int8"}).model_dump_json())
    found = labels(opensan.load(folder, threads=1, text_cache=False))
    assert (found == labels(opensan.SanSegmenter(model, text_cache=False))).mean() > 0.7


def test_no_library_of_the_encoder_is_needed(pair):
    """Neither torch nor what built the encoder; of a tokenizer of its own, the library that reads it, which is said."""
    model, folder = pair
    listed = (folder / "requirements.txt").read_text().splitlines()
    own = model.config.clip.text.own_tokenizer
    assert (OWN_TOKENIZER in listed) is own
    assert (folder / "tokenizer.json").exists() is own
    code = f"""if True:
        import sys
        for name in ("torch", "timm", "open_clip", "transformers"):
            sys.modules[name] = None
        import opensan
        san = opensan.load({str(folder)!r}, threads=1, text_cache=False)
        print(san.segment({str(check.SCENE)!r}, {WORDS!r}).labels.shape)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(")


def test_a_lost_tokenizer_is_named(pair, tmp_path):
    model, whole = pair
    if not model.config.clip.text.own_tokenizer:
        pytest.skip("reads CLIP's tokens")
    folder = shutil.copytree(whole, tmp_path / "lost")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json: not readable .*whole folder"):
        opensan.load(folder)


@pytest.mark.parametrize("name", CLIPS)
def test_every_kind_is_split_into_the_same_graphs(name):
    """Whose image half answers exactly as the model: that its slice leaves nothing out is seen here."""
    model = small_san(name)
    parts = graphs(model, text=True)
    assert set(parts) == {"image", "words", "labels", "text"}
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = parts["image"].module(pixels), model.propose(pixels)
    assert torch.equal(found[0], expected.mask_logits) and torch.equal(found[1], expected.mask_embeddings)


def test_a_grid_that_is_too_coarse_for_the_graphs_pooling_is_refused():
    config = small_san("eva").config
    coarse = config.model_dump() | {"clip_scale": 0.125, "image": config.image.model_dump() | {"size_divisor": 128}}
    with pytest.raises(UserError, match=r"8\.0 times as fine as its encoder's, and an exported model's may be 4 times"):
        graphs(build_empty(ModelConfig.model_validate(coarse)), text=False)
