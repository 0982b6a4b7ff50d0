"""Numbers that are none: NaN, infinity and absurd scales are refused by name, and JSON that is written is JSON."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import opensan
from opensan.checkpoints import load_model, save_folder
from opensan.checkpoints.clip_weights import san_around_clip
from opensan.checkpoints.official import to_official
from opensan.checkpoints.presets import PRESETS
from opensan.config import ImageConfig
from opensan.errors import UserError
from opensan.evaluation.evaluation import Evaluation
from opensan.evaluation.metrics import Counts
from opensan.evaluation.report import write_report
from opensan.files import ASSETS
from opensan.recipe.config import RECIPES, override
from opensan.segmenters.results import Encoding
from opensan.segmenters.san import SanSegmenter

TINY = ASSETS / "models" / "tiny"
PHOTOGRAPH = np.full((96, 128, 3), (60, 150, 55), np.uint8)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, number):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    state = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    name = max(state, key=lambda name: state[name].numel())
    state[name].view(-1)[-1] = number  # one of a million
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"model\.safetensors: {name} holds NaN or infinity"):
        load_model(tmp_path)


def test_official_and_clip_weights_too(tmp_path, small_model, small_config, monkeypatch):
    monkeypatch.setitem(PRESETS, "san-vit-b16", replace(PRESETS["san-vit-b16"], config=small_config))
    official = {name: tensor.clone() for name, tensor in to_official(small_model.state_dict(), small_config).items()}
    official["ov_classifier.bg_embed"].view(-1)[0] = float("nan")
    torch.save({"model": official}, tmp_path / "official.pth")
    with pytest.raises(UserError, match="no_object_embedding holds NaN"):
        load_model(tmp_path / "official.pth")
    clip = {name: tensor.clone() for name, tensor in small_model.clip.state_dict().items()}
    clip["text_projection"].view(-1)[0] = float("inf")
    save_file(clip, tmp_path / "clip.safetensors")
    with pytest.raises(UserError, match=r"clip\.safetensors: text_projection holds NaN or infinity"):
        san_around_clip(small_config, tmp_path / "clip.safetensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image.std.0", 0.0),
        ("image.std.1", float("nan")),
        ("image.std.2", -68.0),
        ("image.std.0", 1e-30),
        ("image.std.0", float("inf")),
        ("image.mean.0", float("nan")),
        ("image.mean.2", 1e30),
        ("clip_scale", 1e-9),
        ("clip_scale", float("nan")),
        ("side_adapter.mlp_ratio", 1e-300),
        ("side_adapter.mlp_ratio", float("inf")),
    ],
)
def test_absurd_scales_of_a_configuration_are_refused_by_key(tmp_path, key, value):
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["image"] = ImageConfig().model_dump(mode="json") | config["image"]
    *path, last = key.split(".")
    part = config
    for name in path:
        part = part[name]
    part[int(last) if last.isdecimal() else last] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"config\.json: {key.replace('.', '[.]')}: ") as caught:
        load_model(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        *("loop.learning_rate=.nan", "loop.learning_rate=.inf", "loop.learning_rate=-1", "loop.weight_decay=.nan"),
        *("loop.clip_norm=.inf", "loss_weights.mask=.nan", "no_object_weight=-.inf", "points.oversampling=.inf"),
        *("data.0.weight=.inf", "augment.flip=.nan", "augment.flip=2", "augment.crop.0=-1", "augment.short_sides=[]"),
        *("loop.workers=100000", "loop.steps=0x" + 5000 * "f"),
    ],
)
def test_absurd_numbers_of_a_recipe_are_refused_by_key(text):
    with pytest.raises(UserError) as caught:
        override(RECIPES["san-vit-b16"], [text])
    assert text.partition("=")[0].split("=")[0] in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 300


def test_finite_weights_that_give_no_numbers_are_told(small_model):
    model = load_model(TINY)
    with torch.no_grad():
        model.side_adapter.query_embedding.fill_(3e38)
    segmenter = SanSegmenter(model, text_cache=False)
    with pytest.raises(UserError, match="no finite numbers"):
        segmenter.segment(PHOTOGRAPH, "night sky, brick")


def test_a_saved_encoding_with_no_numbers_is_refused(tmp_path):
    encoding = opensan.load("tiny", text_cache=False).encode(PHOTOGRAPH)
    encoding.save(tmp_path / "encoding.safetensors")
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "encoding.safetensors").items()}
    from safetensors import safe_open

    with safe_open(tmp_path / "encoding.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors["mask_logits"].view(-1)[3] = float("nan")
    save_file(tensors, tmp_path / "encoding.safetensors", metadata=metadata)
    with pytest.raises(UserError, match="NaN or infinity"):
        Encoding.load(tmp_path / "encoding.safetensors")


@pytest.mark.parametrize("option", ["--timeout", "--keep-seconds"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_limits_of_the_service_are_numbers(run, option, value):
    code, _, stderr = run("serve", "--model", "tiny", "--port", "0", option, value)
    assert code in (1, 2) and stderr.count("\n") == 1 and ("is no limit" in stderr or option in stderr)


def test_json_that_is_written_is_json(tmp_path):
    """A class without a pixel has no IoU: null, where Python would write NaN."""
    names = ("road", "sky")
    write_report(Evaluation(Counts(2).metrics(names), 0, ()), tmp_path, title="nothing", about={})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)["metrics"]["miou"] is None


def test_a_model_that_was_saved_is_loaded_again(tmp_path, small_model):
    folder = save_folder(small_model, tmp_path / "half", dtype=torch.float16)
    assert load_model(folder).config == small_model.config
