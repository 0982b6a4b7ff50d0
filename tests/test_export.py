"""Exported graphs answer as the model does, for sizes and word counts that the export never saw."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import opensan
from opensan import images
from opensan.model.clip import adaptive_max_pool
from opensan.structures import TextClassifier

pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

from opensan import export as exporting
from opensan.export import check, export, formats
from opensan.runtime.graphs import open_graph


@pytest.fixture(scope="module")
def exported(small_model, tmp_path_factory):
    """The small model as ONNX, and what the export's own check found."""
    return export(small_model, tmp_path_factory.mktemp("export") / "small")


def test_the_check_passes_and_compares_every_tensor(exported):
    folder, found = exported
    assert found.passed
    assert set(found.differences) == {"text embeddings", "mask logits", "mask embeddings", "class probabilities"}
    names = {"image.onnx", "words.onnx", "labels.onnx", "text.onnx", "config.json", "export.json"}
    assert {file.name for file in folder.iterdir()} == names


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 3, 96, 96), (3, 3, 64, 160)])
def test_images_of_any_size(exported, small_model, shape):
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    masks, embeddings = open_graph(exported[0] / "image.onnx", threads=1)(pixels=pixels.numpy())
    proposals = small_model.propose(pixels)
    torch.testing.assert_close(torch.from_numpy(masks), proposals.mask_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(embeddings), proposals.mask_embeddings, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_word_is_as_good_as_its_best_synonym(exported, small_model):
    generator = torch.Generator().manual_seed(0)
    embeddings, rows = (F.normalize(torch.randn(n, 24, generator=generator), dim=1) for n in (10, 4))
    proposals = check.Proposals(embeddings, embeddings.unsqueeze(0))
    text = TextClassifier(rows, torch.tensor([0, 1, 1, 2]), 3)
    expected = small_model.classify(proposals, text)[0].softmax(dim=1)[:, :-1]
    (found,) = open_graph(exported[0] / "words.onnx", threads=1)(
        mask_embeddings=embeddings.numpy(), rows=rows.numpy(), rows_of_word=np.array([[0, 0], [1, 2], [3, 3]])
    )
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-6)


def test_a_failed_check_leaves_nothing_behind(exported, small_model, tmp_path, monkeypatch):
    """The graphs are those exported before; the model has changed."""
    folder, _ = exported
    monkeypatch.setattr(
        formats, "write", lambda name, graph, where, *_: shutil.copy(folder / f"{name}.onnx", where / f"{name}.onnx")
    )
    assert export(small_model, tmp_path / "same")[1].passed
    changed = exporting.SAN(
        small_model.config, clip=small_model.clip, side_adapter=small_model.side_adapter
    )  # another "no object"
    changed.no_object_embedding.data = -small_model.no_object_embedding.data
    _, found = export(changed, tmp_path / "changed")
    assert not found.passed
    assert [one.name for one in tmp_path.iterdir() if one.name != "text-cache"] == ["same"]


def test_an_existing_folder_is_refused(small_model, tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        export(small_model, tmp_path)


@pytest.mark.parametrize(("size", "grid"), [((40, 53), (32, 42)), ((6, 4), (3, 2)), ((4, 5), (4, 5)), ((3, 4), (2, 3))])
def test_pooling_for_export_is_adaptive_pooling(monkeypatch, size, grid):
    maps = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    expected = adaptive_max_pool(maps, grid)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch.equal(adaptive_max_pool(maps, grid), expected)


@pytest.fixture(scope="module")
def torch_free(exported):
    """Runs Python code in a process that can't import torch; `folder` is the exported model there."""

    def run(code: str) -> str:
        blocked = f"import sys; sys.modules['torch'] = None; folder = {str(exported[0])!r}\n"
        done = subprocess.run([sys.executable, "-c", blocked + code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_segmenting_without_torch_answers_as_with_it(torch_free, small_model, tmp_path):
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
    segmenter = opensan.Segmenter(small_model, text_cache=False)
    expected = segmenter.segment(check.SCENE, "road|street,car,sky", background=["tree"])
    clear = winners == expected.winners
    assert clear.mean() > 0.999
    np.testing.assert_allclose(confidence[clear], expected.confidence[clear], atol=1e-4)
    encoding = opensan.Encoding.load(tmp_path / "encoding.safetensors")
    assert (segmenter.segment(encoding, "road|street,car,sky", background=["tree"]).winners == winners).mean() > 0.999
    assert (tmp_path / "without.overlay.png").exists() and (tmp_path / "without.segments.json").exists()


def test_the_command_segments_without_torch(torch_free, tmp_path):
    code = "from opensan.cli import main; main({})"
    arguments = (
        f"['segment', {str(check.SCENE)!r}, '--words', 'road,sky', '--model', folder, '--out', {str(tmp_path)!r}]"
    )
    assert "wrote" in torch_free(code.format(arguments))
    assert len(list(tmp_path.glob("playground.*"))) == 3


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
        opensan.load(exported[0], speed="fast")


def test_damaged_exports_are_refused_in_one_line(exported, tmp_path):
    broken = shutil.copytree(exported[0], tmp_path / "broken")
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
