"""Training starts from CLIP's own weights, whole and of the right kind, or not at all."""

import json

import pytest
import torch
from safetensors.torch import save_file

from opensan.checkpoints.clip_weights import san_around_clip
from opensan.checkpoints.presets import PRESETS


def clip_state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.clip.state_dict().items()}


@pytest.mark.parametrize("form", ["file", "folder", "pickle", "half"])
def test_every_weight_of_clip_arrives_and_the_adapter_follows_from_the_seed(tmp_path, small_model, form):
    state = clip_state(small_model)
    path = tmp_path / "open_clip_model.safetensors"
    if form == "half":
        state = {name: tensor.half() for name, tensor in state.items()}
    if form == "pickle":
        path = tmp_path / "clip.pt"
        torch.save(state | {"context_length": torch.tensor(77)}, path)
    else:
        save_file(state, path)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"quick_gelu": True}}))
    source = tmp_path if form == "folder" else path
    model, again, other = (san_around_clip(small_model.config, source, seed=seed) for seed in (3, 3, 4))
    for name, tensor in model.clip.state_dict().items():
        assert torch.equal(tensor, state[name].float()), name
    assert torch.equal(model.side_adapter.query_embedding, again.side_adapter.query_embedding)
    assert not torch.equal(model.side_adapter.query_embedding, other.side_adapter.query_embedding)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in small_model.named_parameters() if parameter.requires_grad}


def test_weights_that_are_not_this_clip_are_refused_by_name(tmp_path, small_model):
    config = small_model.config
    state = clip_state(small_model)
    path = tmp_path / "clip.safetensors"

    save_file({name: tensor for name, tensor in state.items() if name != "visual.proj"}, path)
    with pytest.raises(ValueError, match=r"clip\.safetensors: .*missing visual\.proj"):
        san_around_clip(config, path)
    save_file(state | {"visual.extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"unexpected visual\.extra"):
        san_around_clip(config, path)
    save_file(state | {"visual.proj": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"visual\.proj has shape \(2, 2\)"):
        san_around_clip(config, path)
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        san_around_clip(config, path)


def test_a_clip_of_the_other_activation_is_refused(tmp_path, small_model):
    save_file(clip_state(small_model), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 24}}))
    with pytest.raises(ValueError, match="quick_gelu is False there"):
        san_around_clip(small_model.config, tmp_path)


def test_names_that_lead_to_no_weights(tmp_path, small_model):
    with pytest.raises(ValueError, match="no CLIP weights 'opnai'"):
        san_around_clip(small_model.config, "opnai")
    with pytest.raises(ValueError, match="OpenAI has no CLIP of the shape of small"):
        san_around_clip(small_model.config, "openai")
    with pytest.raises(ValueError, match="holds no CLIP weights"):
        san_around_clip(small_model.config, tmp_path)


def test_without_a_network_the_file_to_fetch_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda _url: (_ for _ in ()).throw(OSError("no route")))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(ConnectionError, match=r"vit_base_patch16_clip_224\.openai.*start\.clip"):
        san_around_clip(PRESETS["san-vit-b16"].config, "openai")
