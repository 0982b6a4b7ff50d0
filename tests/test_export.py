"""Exported graphs answer as the model does, for sizes and word counts that the export never saw."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock

import opensan
from opensan import images
from opensan.assemble.calibration import Calibration
from opensan.checkpoints import load_model
from opensan.config import ModelConfig
from opensan.errors import UserError
from opensan.model.maps import adaptive_max_pool
from opensan.segmenters.exported import requirements
from opensan.segmenters.san import SanSegmenter
from opensan.structures import TextClassifier
from opensan.text.encoder import TextEncoder
from opensan.vocabulary import Vocabulary
from opensan.word_lists import TunedWords

from .conftest import lively_model

pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

from opensan import export as exporting
from opensan.export import check, export, formats
from opensan.segmenters.exported.manifest import ExportManifest
from opensan.segmenters.exported.runtimes import open_graph
from opensan.segmenters.exported.text import EmbeddedWords

KNOWN = Vocabulary.parse("road|street,car,sky")


@pytest.fixture(scope="session")
def model(small_config):
    """Of as few blocks as a SAN may have: an export takes seconds for each."""
    vision = small_config.clip.vision.model_copy(update={"layers": 3})
    text = small_config.clip.text.model_copy(update={"layers": 1})
    clip = small_config.clip.model_copy(update={"vision": vision, "text": text})
    adapter = small_config.side_adapter.model_copy(
        update={"depth": 2, "fusion": {0: 0, 1: 2}, "supervised_blocks": (2,)}
    )
    config = small_config.model_copy(update={"clip": clip, "side_adapter": adapter, "recognition_layer": 2})
    return lively_model(ModelConfig.model_validate(config.model_dump()))


@pytest.fixture(scope="session")
def exported(model, tmp_path_factory):
    """The model as ONNX, with a few words; made once for all processes that test."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "exported"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            assert export(model, folder, words=KNOWN)[1].passed
    return folder


@pytest.fixture
def converted(exported, tmp_path):
    """Makes the exported model's folder in another format or dtype, but for the check."""

    def convert(format: str, dtype: str) -> Path:
        folder = shutil.copytree(exported, tmp_path / f"{format}-{dtype}")
        for path in folder.glob("*.onnx"):
            formats.convert(path, format, dtype)
        manifest = ExportManifest.model_validate_json((folder / "export.json").read_text())
        manifest = manifest.model_copy(update={"format": format, "dtype": dtype})
        (folder / "export.json").write_text(manifest.model_dump_json())
        return folder

    return convert


def test_the_check_compares_every_tensor(exported, model):
    graphs = {name: open_graph(exported / f"{name}.onnx") for name in ("image", "words", "labels", "text")}
    found = check.parity(model, graphs, "float32")
    assert found.passed
    assert set(found.differences) == {"text embeddings", "mask logits", "mask embeddings", "class probabilities"}
    names = {"image.onnx", "words.onnx", "labels.onnx", "text.onnx", "config.json", "export.json"}
    names |= {"words.safetensors", "requirements.txt"}
    assert {file.name for file in exported.iterdir()} == names


@pytest.mark.parametrize(
    ("format", "dtype", "difference", "size"),
    [
        ("onnx", "float16", 1e-2, 0.6),
        ("onnx", "int8", 0.3, 0.5),
        pytest.param(*("openvino", "float32", 1e-4, 1), marks=pytest.mark.slow),
        pytest.param(*("openvino", "float16", 1e-2, 0.6), marks=pytest.mark.slow),
        ("openvino", "bfloat16", 0.3, 0.6),
        ("openvino", "int8", 0.3, 0.5),
    ],
)
def test_smaller_files_answer_alike(converted, exported, model, format, dtype, difference, size):
    if format == "openvino":
        pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    folder = converted(format, dtype)
    segmenters = [opensan.load(one, threads=1) for one in (exported, folder)]
    expected, found = (segmenter.segment(check.SCENE, KNOWN, background=["tree"]) for segmenter in segmenters)
    for name in ("mask_logits", "mask_embeddings"):
        truth = getattr(expected.encoding, name)
        assert np.abs(getattr(found.encoding, name) - truth).max() < difference * np.abs(truth).max()
    assert (found.labels == expected.labels).mean() > 1 - difference
    weights = [sum(path.stat().st_size for path in one.glob("image.[ob]*[nx]")) for one in (folder, exported)]
    assert weights[0] < size * weights[1] + 200_000  # what is no weight takes as much in any


@pytest.fixture
def without_text(exported, tmp_path):
    """The exported model without its text tower."""
    folder = shutil.copytree(exported, tmp_path / "without")
    (folder / "text.onnx").unlink()
    manifest = json.loads((folder / "export.json").read_text()) | {"text": False}
    (folder / "export.json").write_text(json.dumps(manifest))
    return folder


def test_tuned_words_need_no_text_tower_and_answer_as_with_torch(model, without_text):
    torch_model = SanSegmenter(model, text_cache=False)
    chance = np.random.default_rng(3)
    rows = tuple((word, chance.standard_normal(24).astype("<f2").tobytes()) for word in ("meadow", "sky"))
    identity = torch_model.identity
    words = replace(Vocabulary.parse("meadow, sky"), tuned=TunedWords("", identity.image, identity.text, rows))
    exported = opensan.load(without_text, text_cache=False)
    answer = exported.segment(check.SCENE, words)
    assert (answer.labels == torch_model.segment(check.SCENE, words).labels).mean() > 0.99
    with pytest.raises(UserError, match="exported without its text tower"):
        exported.segment(check.SCENE, "meadow, sky")
    with pytest.raises(UserError, match="tuned for the model"):
        exported.segment(check.SCENE, replace(words, tuned=replace(words.tuned, image="0" * 64)))


def test_words_that_are_tuned_are_exported_as_their_texts_are(model, tmp_path):
    """The file keeps rows by their prompts, which others may ask with."""
    identity = SanSegmenter(model, text_cache=False).identity
    tuned = TunedWords("", identity.image, identity.text, (("car", b"\0\1" * 24),))
    (plain := tmp_path / "plain").mkdir()
    exporting._describe(model, tmp_path, "onnx", "float32", False, replace(KNOWN, tuned=tuned))
    exporting._describe(model, plain, "onnx", "float32", False, KNOWN)
    files = [folder / "words.safetensors" for folder in (tmp_path, plain)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_exported_model_has_its_models_calibration(exported, model, tmp_path):
    """And not another model's."""
    folder = shutil.copytree(exported, tmp_path / "calibrated")
    plain = opensan.SanSegmenter(model, text_cache=False)
    calibration = Calibration(str(plain.identity), 0.4, ("road", "car", "sky"), "scenes", 1, 1, 0.5, 0.1)
    exporting._describe(model, folder, "onnx", "float32", True, KNOWN, calibration)
    plain.calibrate(calibration)
    answer, expected = (each.segment(check.SCENE, "road,car,sky") for each in (opensan.load(folder), plain))
    assert answer.calibration == calibration
    clear = answer.winners == expected.winners
    np.testing.assert_allclose(answer.confidence[clear], expected.confidence[clear], atol=1e-4)
    uncalibrated = opensan.load(exported).segment(check.SCENE, "road,car,sky")
    assert abs(uncalibrated.confidence - answer.confidence).max() > 0.01
    replace(calibration, model="other-000000000000").save(folder / "calibration.json")
    with pytest.raises(UserError, match=r"calibration.json: this calibration was fitted for the model other-0"):
        opensan.load(folder)


def test_known_words_need_no_text_tower(exported, without_text):
    whole = opensan.load(exported, text_cache=False)
    san = opensan.load(without_text, text_cache=False)
    assert np.array_equal(
        san.segment(check.SCENE, "sky,street", background="car").labels,
        whole.segment(check.SCENE, "sky,street", background="car").labels,
    )
    assert np.array_equal(
        san.segment(check.SCENE, "Sky, STREET", background=" Car").labels,  # capitals and spaces reach no token
        whole.segment(check.SCENE, "sky,street", background="car").labels,
    )
    with pytest.raises(ValueError, match=r"word 'dog': .* knows only road, street, car, sky"):
        san.segment(check.SCENE, "sky,dog")
    (without_text / "words.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"words\.safetensors: not embedded words"):
        opensan.load(without_text)
    (without_text / "words.safetensors").unlink()
    with pytest.raises(ValueError, match="without text tower and words"):
        opensan.load(without_text, text_cache=False).segment(check.SCENE, "sky")


def test_words_embedded_at_export_are_those_of_the_model(exported, model):
    embedded = EmbeddedWords.load(exported / "words.safetensors", 24)
    rows = TextEncoder(model, disk_cache=False).rows(KNOWN)
    assert embedded.names == ("road", "street", "car", "sky")
    assert np.array_equal(np.stack(list(embedded.rows.values())), rows)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 3, 96, 96), (3, 3, 64, 160)])
def test_images_of_any_size(exported, model, shape):
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    masks, embeddings = open_graph(exported / "image.onnx", threads=1)(pixels=pixels.numpy())
    proposals = model.propose(pixels)
    torch.testing.assert_close(torch.from_numpy(masks), proposals.mask_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(embeddings), proposals.mask_embeddings, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_word_is_as_good_as_its_best_synonym(exported, model):
    generator = torch.Generator().manual_seed(0)
    embeddings, rows = (F.normalize(torch.randn(n, 24, generator=generator), dim=1) for n in (10, 4))
    proposals = check.Proposals(embeddings, embeddings.unsqueeze(0))
    text = TextClassifier(rows, torch.tensor([0, 1, 1, 2]), 3)
    expected = model.classify(proposals, text)[0].softmax(dim=1)[:, :-1]
    (found,) = open_graph(exported / "words.onnx", threads=1)(
        mask_embeddings=embeddings.numpy(), rows=rows.numpy(), rows_of_word=np.array([[0, 0], [1, 2], [3, 3]])
    )
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-6)


def test_a_failed_check_leaves_nothing_behind(exported, model, tmp_path, monkeypatch):
    """The graphs are those exported before; the model has changed."""
    folder = exported
    monkeypatch.setattr(
        formats, "write", lambda name, graph, where, *_: shutil.copy(folder / f"{name}.onnx", where / f"{name}.onnx")
    )
    assert export(model, tmp_path / "same")[1].passed
    changed = exporting.SAN(model.config, backbone=model.clip, side_adapter=model.side_adapter)  # another "no object"
    changed.no_object_embedding.data = -model.no_object_embedding.data
    _, found = export(changed, tmp_path / "changed")
    assert not found.passed
    assert [one.name for one in tmp_path.iterdir() if one.name != "text-cache"] == ["same"]


def test_an_existing_folder_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        export(model, tmp_path)


@pytest.mark.parametrize(("size", "grid"), [((40, 53), (32, 42)), ((6, 4), (3, 2)), ((4, 5), (4, 5)), ((3, 4), (2, 3))])
def test_pooling_for_export_is_adaptive_pooling(monkeypatch, size, grid):
    maps = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    expected = adaptive_max_pool(maps, grid)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch.equal(adaptive_max_pool(maps, grid), expected)


MINIMAL = """
import importlib.metadata, re, sys

def named(distribution):
    return re.match(r"[\\w.-]+", distribution)[0].lower().replace("_", "-")

def keep_only(waiting):
    kept = {"opensan"}
    while waiting:
        name = named(waiting.pop())
        if name not in kept:
            kept.add(name)
            # What only other systems or extras need has a marker.
            waiting += [one for one in importlib.metadata.requires(name) or () if ";" not in one]
    for module, owners in importlib.metadata.packages_distributions().items():
        if not kept & set(map(named, owners)):
            sys.modules[module] = None
"""


@pytest.fixture
def torch_free(exported):
    """Runs Python code where nothing is installed but what the exported model, `folder` there, asks for."""

    def run(code: str, returncode: int = 0) -> str:
        wanted = [line for line in (exported / "requirements.txt").read_text().splitlines() if line[0] != "#"]
        prepare = f"{MINIMAL}\nkeep_only({wanted})\nfolder = {str(exported)!r}\n"
        done = subprocess.run([sys.executable, "-c", prepare + code], capture_output=True, text=True)
        assert done.returncode == returncode, done.stderr
        return done.stderr if returncode else done.stdout

    return run


def test_requirements_are_ranges_of_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(requirements.COMMON) < set(project["dependencies"])
    for format, needed in requirements.RUNTIME.items():
        assert needed in extras[format]
    assert requirements.OWN_TOKENIZER in extras["encoders"]


def test_segmenting_without_torch_answers_as_with_it(torch_free, model, tmp_path):
    """Words with synonyms and a background; an encoding made there can be asked here, and confidences agree."""
    torch_free(f"""if True:
        import numpy as np, opensan
        from PIL import Image
        san = opensan.load(folder + "/image.onnx", text_cache=False, threads=1)
        found = san.segment({str(check.SCENE)!r}, "road|street,car,sky", background=["tree"])
        found.save({str(tmp_path)!r}, "without")
        found.encoding.save({str(tmp_path / "encoding.safetensors")!r})
        again = opensan.Encoding.load({str(tmp_path / "encoding.safetensors")!r})
        other = san.segment(again, ["sand", "snow"])
        assert np.array_equal(other.labels, found.relabel(["sand", "snow"]).labels)
        np.savez({str(tmp_path / "found.npz")!r}, winners=found.winners, confidence=found.confidence)
    """)
    with np.load(tmp_path / "found.npz") as found:
        winners, confidence = found["winners"], found["confidence"]
    segmenter = opensan.SanSegmenter(model, text_cache=False)
    expected = segmenter.segment(check.SCENE, "road|street,car,sky", background=["tree"])
    clear = winners == expected.winners
    assert clear.mean() > 0.999
    np.testing.assert_allclose(confidence[clear], expected.confidence[clear], atol=1e-4)
    encoding = opensan.Encoding.load(tmp_path / "encoding.safetensors")
    assert (segmenter.segment(encoding, "road|street,car,sky", background=["tree"]).winners == winners).mean() > 0.999
    assert (tmp_path / "without.overlay.png").exists() and (tmp_path / "without.segments.json").exists()


COMMAND = "from opensan.cli import main; main([{}])"


@pytest.mark.parametrize("formats", ["png,overlay,json", "png,coco,yolo,voc,labelstudio"])
def test_the_command_segments_without_torch(torch_free, tmp_path, formats):
    arguments = f"'segment', {str(check.SCENE)!r}, '--words', 'road,sky', '--format', {formats!r}, '--model', folder"
    said = torch_free(COMMAND.format(f"{arguments}, '--out', {str(tmp_path / 'out')!r}"))
    assert "wrote" in said or "1 of 1 images done" in said
    assert list((tmp_path / "out").glob("playground.labels.png"))


@pytest.mark.parametrize("command", ["segment-raster", "eval", "profile"])
def test_what_needs_torch_says_so(torch_free, tmp_path, command):
    arguments = {
        "segment-raster": "'segment-raster', 'a.png', '--words', 'sky', '--model', folder",
        "eval": "'eval', '--model', folder, '--data', 'data', '--out', 'out'",
        "profile": "'profile', folder",
    }
    said = torch_free(f"import os; os.chdir({str(tmp_path)!r}); " + COMMAND.format(arguments[command]), returncode=1)
    assert said.startswith("error: ") and said.count("\n") == 1 and "pip install" in said


def test_an_exported_model_is_no_checkpoint(exported):
    with pytest.raises(ValueError, match=r"an exported model, which `opensan segment`"):
        load_model(exported)


def test_other_models_need_torch_and_say_so(torch_free):
    said = torch_free("""if True:
        import opensan
        try:
            opensan.load("tiny")
        except ValueError as error:
            print(error)
    """)
    assert "needs torch" in said and said.count("\n") == 1


def test_what_was_decided_at_export_can_not_be_chosen(exported):
    with pytest.raises(ValueError, match="speed can't be chosen"):
        opensan.load(exported, speed="fast")


def test_damaged_exports_are_refused_in_one_line(exported, tmp_path):
    broken = shutil.copytree(exported, tmp_path / "broken")
    (broken / "words.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"words\.onnx: not a graph"):
        opensan.load(broken)
    (broken / "words.onnx").unlink()
    with pytest.raises(ValueError, match=r"words\.onnx: no such file"):
        opensan.load(broken)
    (broken / "export.json").write_text('{"format": "onnx"}')
    with pytest.raises(ValueError, match=r"export\.json"):
        opensan.load(broken)


def test_pixels_without_torch_are_the_same_pixels(small_config):
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    assert np.array_equal(
        images.prepare(image, small_config.image).pixels, images.prepare_array(image, small_config.image).pixels
    )


def test_an_exported_model_needs_no_torch_even_where_it_is_installed(exported):
    code = f"import opensan, sys; opensan.load({str(exported)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_text_tower_is_read_when_a_word_needs_it_and_its_damage_reported_then(exported, tmp_path):
    broken = shutil.copytree(exported, tmp_path / "broken")
    (broken / "text.onnx").write_bytes(b"nothing")
    segmenter = opensan.load(broken, text_cache=False)
    assert segmenter.segment(check.SCENE, KNOWN).names == KNOWN.names  # embedded at export
    with pytest.raises(ValueError, match=r"text\.onnx: not a graph"):
        segmenter.segment(check.SCENE, "a word that nobody embedded")
    (broken / "text.onnx").unlink()
    with pytest.raises(ValueError, match=r"text\.onnx: no such file"):
        opensan.load(broken)
