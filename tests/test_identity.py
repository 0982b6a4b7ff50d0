"""A model is known by all its numbers and its configuration; a segmenter leaves the caller's model as it is."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from opensan.checkpoints import load_folder, save_folder
from opensan.config import ClipConfig, ModelConfig, SideAdapterConfig, TextConfig, VisionConfig
from opensan.export import export
from opensan.model import SAN, build_san
from opensan.model.identity import frozen_identity, model_identity
from opensan.segmenters.load import load
from opensan.segmenters.san import SanSegmenter
from opensan.structures import Identity

CONFIG = ModelConfig(
    name="least",
    clip=ClipConfig(
        embed_dim=6,
        quick_gelu=True,
        vision=VisionConfig(width=8, layers=2, heads=2, patch_size=8, image_size=16),
        text=TextConfig(width=8, layers=1, heads=2, context_length=8),
    ),
    side_adapter=SideAdapterConfig(
        width=6,
        depth=2,
        heads=2,
        image_size=32,
        queries=3,
        fusion={0: 0, 1: 1},
        supervised_blocks=(1, 2),
        mask_channels=4,
        mlp_channels=4,
    ),
    recognition_layer=1,
)


@functools.cache
def least() -> tuple[SAN, Identity]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_san(CONFIG)
    return model, model_identity(model)


def fields(config: BaseModel, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every value in `config`."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from fields(value, (*path, name))
        else:
            yield (*path, name)


def with_other(config: BaseModel, path: tuple[str, ...]) -> Any:
    """`config` with another value at `path`, whether valid or not."""
    name, *rest = path
    value = getattr(config, name)
    return config.model_copy(update={name: with_other(value, tuple(rest)) if rest else f"not {value}"})


@pytest.mark.parametrize("name", [name for name, _ in build_san(CONFIG).named_parameters()])
def test_one_number_anywhere_makes_another_model(name):
    model, before = least()
    text = name.startswith("clip.") and not name.startswith(("clip.visual.", "clip.logit_scale"))
    values = model.get_parameter(name).data.view(-1)
    kept = values[-1].item()
    values[-1] += 1e-3
    after = model_identity(model)
    values[-1] = kept
    assert (after.image == before.image) is text and (after.text == before.text) is not text
    assert (after.encodings == before.encodings) is text and str(after) != str(before)
    assert model_identity(model) == before


SETTINGS = [path for path in fields(CONFIG) if path != ("rest_share",)]
"""Of which the identity depends: what `rest_share` decides is part of the vocabulary."""


@pytest.mark.parametrize("path", SETTINGS, ids=".".join)
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_one_setting_anywhere_makes_another_model(path):
    model, before = least()
    model.config = with_other(CONFIG, path)
    try:
        after = model_identity(model)
    finally:
        model.config = CONFIG
    text = path[:2] == ("clip", "text")
    both = path in {("clip", "kind"), ("clip", "embed_dim"), ("clip", "quick_gelu")}
    assert (after.image == before.image) is text and (after.text == before.text) is (not text and not both)


def test_equal_numbers_are_one_model_whatever_holds_them(tmp_path):
    """Saved, loaded, in half precision or not: what counts are the numbers. Rounded, they are others."""
    model, before = least()
    loaded = load_folder(save_folder(model, tmp_path / "full"))
    assert model_identity(loaded) == before
    half = load_folder(save_folder(model, tmp_path / "half", torch.float16))
    assert model_identity(half) != before
    assert model_identity(half) == model_identity(half.half()), "computed with otherwise, but the same model"


def test_what_is_frozen_does_not_change_in_training(fresh_model):
    model = fresh_model()
    before = frozen_identity(model), model_identity(model)
    for one in model.trained():
        one.parameter.data += 1
    assert frozen_identity(model) == before[0] and model_identity(model) != before[1]
    model.clip.visual.proj.data[0, 0] += 1
    assert frozen_identity(model) != before[0]


@pytest.fixture
def models(model_folder, tmp_path):
    """The folder of a model, and of others, in each of which one group of the weights is different."""
    state = load_file(model_folder / "model.safetensors")
    config = (model_folder / "config.json").read_text()
    generator = torch.Generator().manual_seed(0)
    groups = {"first": (), "heads": "side_adapter.head.", "blocks": "clip.visual.", "words": "clip.transformer."}
    for folder, start in groups.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(config)
        changed = {
            name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in state.items()
            if name.startswith(start)
        }
        save_file(state | changed, tmp_path / folder / "model.safetensors")
    return tmp_path


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def test_models_are_not_taken_for_one(models, run, tmp_path):
    """A folder that was labelled by one model is labelled anew by another, though most of its weights are the same."""
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(picture()).save(tmp_path / "in" / name)

    def segment(model: str) -> str:
        words = ("--words", "night sky, brick, grass", "--format", "png")
        code, out, err = run("segment", tmp_path / "in", "--model", models / model, *words, "--out", tmp_path / "out")
        assert code == 0, err
        return out + err

    segment("first")
    assert "earlier" in segment("first")
    for other in ("heads", "blocks", "words"):
        assert "another model" in segment(other)
        assert "earlier" in segment(other)


def test_encodings_are_not_exchanged_between_models(models):
    first, heads, blocks, words = (
        SanSegmenter(load_folder(models / name), text_cache=False) for name in ("first", "heads", "blocks", "words")
    )
    encoding = first.encode(picture())
    for other in (heads, blocks):
        with pytest.raises(ValueError, match="this encoding was made by model"):
            other.segment(encoding, ["sky", "grass"])
    words.segment(encoding, ["sky", "grass"])  # its image half is the same
    assert len({first.identity, heads.identity, blocks.identity, words.identity}) == 4


def test_an_exported_model_is_known_by_what_it_was_made_from(models, tmp_path):
    pytest.importorskip("onnxruntime")
    original = load_folder(models / "first")
    folder, found = export(original, tmp_path / "exported")
    assert found.passed
    exported, first = load(folder, text_cache=False), SanSegmenter(original, text_cache=False)
    assert exported.identity.encodings == first.identity.encodings
    heads = SanSegmenter(load_folder(models / "heads"), text_cache=False)
    with pytest.raises(ValueError, match="this encoding was made by model"):
        heads.segment(exported.encode(picture()), ["sky", "grass"])


def test_a_segmenter_leaves_the_callers_model_as_it_is(fresh_model):
    """It can be trained on, and the segmenter goes on answering as the model was."""
    model = fresh_model().train()
    trained = {one.name for one in model.trained()}
    segmenter = SanSegmenter(model, dtype="bfloat16", text_cache=False)
    assert model.training and {one.name for one in model.trained()} == trained
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    before = segmenter.segment(picture(), ["sky", "grass"]).encoding.mask_logits
    proposals = model.propose(torch.randn(1, 3, 64, 96), supervise=True)
    (proposals.mask_logits.square().mean() + proposals.mask_embeddings.sum()).backward()
    assert all(one.parameter.grad is not None for one in model.trained() if one.name != "no_object_embedding")
    torch.optim.SGD([one.parameter for one in model.trained()], lr=1.0).step()
    after = segmenter.segment(picture(), ["sky", "grass"]).encoding.mask_logits
    assert torch.equal(before, after)
    assert SanSegmenter(model, text_cache=False).identity != segmenter.identity


def test_a_segmenter_shares_the_memory_of_what_is_frozen(fresh_model):
    """All but the matrices of blocks, which lie in another order for inference on a CPU."""
    model = fresh_model()
    own = SanSegmenter(model, text_cache=False).model
    shared = 0
    for name, parameter in model.named_parameters():
        if own.get_parameter(name).is_mkldnn:
            assert ".resblocks." in name or ".blocks." in name, name
            continue
        same = own.get_parameter(name).data_ptr() == parameter.data_ptr()
        assert same is not parameter.requires_grad, name
        shared += same
    assert shared > 20
