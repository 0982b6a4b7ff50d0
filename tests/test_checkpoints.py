"""Files from outside: hostile, damaged, of another model; and our own, there and back."""

import builtins
import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from opensan.checkpoints import build_empty, load_folder, load_model, load_official, save_folder
from opensan.checkpoints.official import BUFFERS, from_official, official_name, official_shape, to_official
from opensan.checkpoints.presets import PRESETS
from opensan.config import ModelConfig, parse_config
from opensan.errors import UserError

SMALLEST = "side_adapter.head.bias_scale.weight"
OFFICIAL_SMALLEST = "side_adapter_network.mask_decoder.bias_scaling.weight"


@pytest.fixture(scope="module")
def folder(small_model, tmp_path_factory):
    """A good checkpoint folder. Not to be changed: `copy` is for that."""
    return save_folder(small_model, tmp_path_factory.mktemp("good"))


@pytest.fixture
def copy(folder, tmp_path):
    """A checkpoint folder to damage."""
    target = tmp_path / "copy"
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.fixture(scope="module")
def official(small_model, small_config):
    """The small model under official names, with the constants that official files hold besides."""
    state = to_official(small_model.state_dict(), small_config)
    return state | {name: torch.ones(3) for name in sorted(BUFFERS)}


def refusal(load, *arguments) -> str:
    """The message of the ValueError that `load` must raise: one line, and no advice to load the file unsafely."""
    with pytest.raises(ValueError) as error:
        load(*arguments)
    message = str(error.value)
    assert message and "\n" not in message and "weights_only" not in message, message
    return message


def assert_equal_states(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32, name
        assert torch.equal(found[name], tensor), name


# Hostile files


class Call:
    """Unpickled by an ordinary unpickler, this calls `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


WRITERS = {
    "zip": torch.save,
    "legacy": lambda data, path: torch.save(data, path, _use_new_zipfile_serialization=False),
    "raw": lambda data, path: path.write_bytes(pickle.dumps(data, protocol=2)),
    "raw, newest": lambda data, path: path.write_bytes(pickle.dumps(data)),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("place", ["beside the weights", "among the weights", "the whole file"])
@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("function", [os.system, builtins.exec, builtins.eval])
def test_a_malicious_pickle_executes_nothing(tmp_path, function, format, place):
    mark = tmp_path / "executed"
    call = Call(function, f"touch '{mark}'" if function is os.system else f"open({str(mark)!r}, 'w').close()")
    data = {
        "beside the weights": {"model": {"a": torch.ones(2)}, "iteration": call},
        "among the weights": {"model": {"a": torch.ones(2), "b": call}},
        "the whole file": call,
    }[place]
    file = tmp_path / "bad.pth"
    WRITERS[format](data, file)

    message = refusal(load_model, file)
    assert not mark.exists()
    assert str(file) in message
    if not format.startswith("raw"):
        assert "refused" in message and function.__name__ in message

    # It was no blank shot: read carelessly, the same file does execute.
    if format.startswith("raw"):
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert mark.exists()


def test_numpy_constructors_are_not_let_in(tmp_path, official, small_config):
    """A numpy value among the weights is no weight, and what it claims about memory is never believed."""
    state = official | {OFFICIAL_SMALLEST: np.ones((1, 1), np.float32)}
    file = tmp_path / "numpy.pth"
    torch.save({"model": state}, file)
    assert f"missing {OFFICIAL_SMALLEST}" in refusal(load_official, file, small_config)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("format", ["zip", "legacy"])
def test_a_damaged_pickle_is_a_value_error(tmp_path, format):
    whole = tmp_path / "whole.pth"
    WRITERS[format]({"model": {"a": torch.ones(2), "b": torch.ones(2, 3)}, "iteration": 3}, whole)
    content, chance = whole.read_bytes(), random.Random(0)
    broken = [content[: chance.randrange(len(content))] for _ in range(60)]
    for _ in range(60):
        changed = bytearray(content)
        for _ in range(3):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        broken.append(bytes(changed))
    file = tmp_path / "broken.pth"
    for damaged in [b"", b"PK\x03\x04", b"not a checkpoint", *broken]:
        file.write_bytes(damaged)
        refusal(load_model, file)


@pytest.mark.parametrize("data", [3, [torch.ones(2)], {}, {"model": {"a": 1}}, {"model": torch.ones(2)}])
def test_a_pickle_without_weights_says_so(tmp_path, data):
    file = tmp_path / "empty.pth"
    torch.save(data, file)
    assert "holds no model weights" in refusal(load_model, file)


# Official files


def test_the_official_names_are_the_released_ones():
    config = PRESETS["san-vit-b16"].config
    for ours, theirs in {
        "clip.visual.transformer.resblocks.8.ln_1.weight": "clip_visual_extractor.resblocks.8.ln_1.weight",
        "clip.visual.transformer.resblocks.9.ln_1.weight": "clip_rec_head.resblocks.0.ln_1.weight",
        "clip.visual.positional_embedding": "clip_visual_extractor.positional_embedding",
        "clip.visual.proj": "clip_rec_head.proj",
        "clip.token_embedding.weight": "ov_classifier.token_embedding.weight",
        "no_object_embedding": "ov_classifier.bg_embed",
    }.items():
        assert official_name(ours, config) == theirs


def test_official_and_back_changes_nothing(small_model, small_config):
    state = small_model.state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items()}
    theirs = to_official(state, small_config)
    assert len(theirs) == len(state)
    assert_equal_states(from_official(theirs, small_config, shapes, "memory"), state)


@pytest.mark.parametrize("format", ["zip", "legacy"])
def test_a_training_checkpoint_converts_and_loads(tmp_path, official, small_model, small_config, format):
    """As detectron2 writes them: weights under `model`, and beside them whatever training wanted to keep."""
    file = tmp_path / "model_final.pth"
    data = {
        "model": OrderedDict(official),
        "iteration": 3,
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4)}},
            "param_groups": [{"lr": np.float64(1e-4), "betas": (0.9, 0.999), "params": [0]}],
        },
        "scheduler": {"base_lrs": np.full(3, 1e-4), "last_epoch": np.int64(3)},
        "trainer": {"metrics": [np.array(["mIoU", 41.9], dtype=object)], "seed": np.random.default_rng(0).integers(9)},
    }
    WRITERS[format](data, file)
    converted = save_folder(load_official(file, small_config), tmp_path / "converted")
    assert sorted(path.name for path in converted.iterdir()) == ["config.json", "model.safetensors"]
    model = load_model(converted)
    assert model.config == small_config
    assert_equal_states(model.state_dict(), small_model.state_dict())
    assert_equal_states(load_model(converted / "model.safetensors").state_dict(), small_model.state_dict())


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if preset.official])
def test_an_official_file_is_known_by_its_tensors(tmp_path, preset):
    config = PRESETS[preset].config
    zero = torch.zeros(())  # one number stands for all of a tensor's, in memory and in the file
    state = {
        official_name(name, config): zero.expand(official_shape(name, tensor.shape))
        for name, tensor in build_empty(config).state_dict().items()
    }
    file = tmp_path / "renamed.pth"
    torch.save(state, file)
    assert load_model(file).config == config


def test_missing_and_surplus_official_keys_are_named(tmp_path, official, small_config):
    file = tmp_path / "wrong.pth"
    state = {name: tensor for name, tensor in official.items() if name != "ov_classifier.bg_embed"}
    torch.save({"model": state | {"side_adapter_network.extra": torch.ones(1)}}, file)
    message = refusal(load_official, file, small_config)
    assert "missing ov_classifier.bg_embed; unexpected side_adapter_network.extra" in message

    torch.save({"model": official | {"clip_rec_head.proj": torch.ones(2, 3)}}, file)
    message = refusal(load_official, file, small_config)
    assert "clip_rec_head.proj has shape (2, 3), the model needs (32, 24)" in message


def test_a_checkpoint_of_another_model_names_a_few_of_many(tmp_path, official):
    """No preset is as small as this; hundreds of names must still fit a line."""
    file = tmp_path / "small.pth"
    torch.save({"model": official}, file)
    message = refusal(load_model, file)
    assert "missing clip_rec_head.resblocks.2." in message and "more" in message
    assert len(message) < 1500


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("layout", ["meta", "sparse"])
def test_tensors_without_numbers_in_place_are_no_weights(tmp_path, official, small_config, layout):
    odd = torch.ones(1, 1, device="meta") if layout == "meta" else torch.ones(1, 1).to_sparse()
    file = tmp_path / "odd.pth"
    torch.save({"model": official | {OFFICIAL_SMALLEST: odd}}, file)
    assert f"missing {OFFICIAL_SMALLEST}" in refusal(load_official, file, small_config)


# Our folder


def rewrite(folder, change):
    """Apply `change` to the tensors of a checkpoint folder."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def test_missing_surplus_and_misshapen_tensors_are_named(copy):
    rewrite(copy, lambda state: state.update({"extra": state.pop(SMALLEST)}))
    message = refusal(load_folder, copy)
    assert f"missing {SMALLEST}; unexpected extra" in message and str(copy) in message
    rewrite(copy, lambda state: state.update({SMALLEST: torch.ones(2, 1)}) or state.pop("extra"))
    assert f"{SMALLEST} has shape (2, 1), config.json asks for (1, 1)" in refusal(load_folder, copy)
    rewrite(copy, lambda state: state.update({SMALLEST: torch.ones(1, 1, dtype=torch.int8)}))
    assert f"{SMALLEST} holds torch.int8" in refusal(load_folder, copy)


def test_damaged_weights_are_a_value_error(copy):
    file = copy / "model.safetensors"
    content = file.read_bytes()
    header = int.from_bytes(content[:8], "little")
    for damaged in (
        b"",
        content[:5],
        content[: 8 + header // 2],
        content[: 8 + header],
        content[:-1],
        content + b"\0",
        b"\xff" * 8 + content[8:],
        content[:8] + b"[" * header + content[8 + header :],
        b"not a safetensors file at all",
    ):
        file.write_bytes(damaged)
        assert f"{file}: not a readable safetensors file" in refusal(load_model, copy)
    file.unlink()
    assert f"{file}: not a readable safetensors file" in refusal(load_model, copy)


@pytest.mark.parametrize(
    "where, value",
    [
        ("colour", "blue"),
        ("clip.vision.colour", "blue"),
        ("clip.vision.layers", 60_000),
        ("clip.vision.width", 10**12),
        ("clip.vision.width", -32),
        ("clip.vision.mlp_ratio", 1e300),
        ("clip.text.layers", 10**9),
        ("clip.text.vocab_size", 10**9),
        ("side_adapter.depth", 60_000),
        ("side_adapter.mlp_layers", 60_000),
        ("side_adapter.mlp_ratio", float("nan")),
        ("side_adapter.queries", "many"),
        ("clip_scale", float("inf")),
        ("image.long_side", 10**9),
        ("format", 2),
    ],
)
def test_an_impossible_configuration_names_the_key(copy, where, value):
    file = copy / "config.json"
    config = json.loads(file.read_text())
    *path, last = where.split(".")
    part = config
    for key in path:
        part = part[key]
    part[last] = value
    file.write_text(json.dumps(config))
    assert f"{file}: {where}: " in refusal(load_model, copy)


def test_sizes_that_the_weights_do_not_have_are_an_error_not_an_allocation(copy):
    file = copy / "config.json"
    config = json.loads(file.read_text())
    config["side_adapter"]["queries"] = 65_536
    config["clip"]["vision"]["image_size"] = 65_536
    file.write_text(json.dumps(config))
    assert "config.json asks for" in refusal(load_model, copy)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b"[" * 100_000,
        b'{"name": ' + b"9" * 5_000 + b"}",
        b"name: small",
    ],
    ids=["empty", "cut", "not text", "null", "list", "endless nesting", "endless number", "not JSON"],
)
def test_a_configuration_that_is_no_json_object_is_a_value_error(copy, content):
    (copy / "config.json").write_bytes(content)
    assert f"{copy / 'config.json'}: " in refusal(load_model, copy)


def test_a_model_that_is_nowhere_says_what_it_could_have_been(tmp_path):
    message = refusal(load_model, "san-vit-b32")
    assert "san-vit-b32" in message and "san-vit-b16" in message and "tiny" in message and "owner/name" in message
    file = tmp_path / "weights.onnx"
    file.touch()
    assert str(file) in refusal(load_model, file)
    assert "config.json" in refusal(load_model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_stored_in_half_precision_load_as_float32(small_model, tmp_path, dtype):
    folder = save_folder(small_model, tmp_path / "half", dtype=dtype)
    rounded = {name: tensor.to(dtype).float() for name, tensor in small_model.state_dict().items()}
    assert_equal_states(load_folder(folder).state_dict(), rounded)
    numbers = sum(tensor.numel() for tensor in rounded.values())
    assert (folder / "model.safetensors").stat().st_size < 2.2 * numbers


# Writing


def filled(config, number):
    """A model of `config` in which every weight is `number`, so that a mixture of two files would show."""
    model = build_empty(config).to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(number)
    return model


def test_a_full_disk_leaves_the_old_file(copy, small_config):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["model.safetensors"]) // 2, hard))
    try:
        with pytest.raises(OSError) as error:
            save_folder(filled(small_config, 1.0), copy)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(copy / "model.safetensors"))
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_two_models_are_never_mixed(copy, small_config, monkeypatch):
    """Whatever rename is the last before a process dies, the folder holds the old model, the new one, or none."""
    other = small_config.model_copy(update={"clip_scale": 0.25})  # of the same shapes: nothing else would notice
    old, new = filled(small_config, 1.0), filled(other, 2.0)
    replace, found = Path.replace, []
    for renames in (0, 1, 2):
        save_folder(old, copy)

        def die_after(path, target, left=iter([True] * renames)):
            if not next(left, False):
                raise MemoryError
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", die_after)
        with suppress(MemoryError):
            save_folder(new, copy)
        monkeypatch.undo()
        try:
            model = load_folder(copy)
        except ValueError as error:
            assert "config.json" in str(error)
            found.append(None)
        else:
            found.append((model.config.clip_scale, model.state_dict()[SMALLEST].item()))
    assert found == [None, None, (0.25, 2.0)]


def test_a_kill_leaves_a_whole_file(tmp_path, small_config):
    target, chance = tmp_path / "model", random.Random(0)
    save_folder(filled(small_config, 0.0), target)
    weights = target / "model.safetensors"
    models = [filled(small_config, number) for number in (1.0, 2.0)]
    for _ in range(8):
        child = os.fork()
        if child == 0:
            try:
                for turn in range(100_000):
                    save_folder(models[turn % 2], target)
            finally:
                os._exit(1)
        before = weights.stat().st_ino
        for _ in range(1_000):  # a save or more must have ended; then somewhere in a later one
            time.sleep(0.01)
            if weights.stat().st_ino != before:
                break
        time.sleep(chance.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the child ended by itself"
        state = load_folder(target).state_dict()
        assert len({number for tensor in state.values() for number in tensor.unique().tolist()}) == 1
        assert state[SMALLEST].item() != 0, "no save ever ended"


def test_the_family_of_a_backbone_is_told_by_its_kind(small_config, tmp_path):
    """A configuration without a kind is a CLIP's; an unknown kind, and a key of another family, are refused by name."""
    data = json.loads(small_config.model_dump_json())
    del data["clip"]["kind"]

    def with_kind(kind: str) -> dict:
        return data | {"clip": data["clip"] | {"kind": kind}}

    assert parse_config(ModelConfig, data, "config.json") == small_config
    unknown = refusal(parse_config, ModelConfig, with_kind("perceiver"), "config.json")
    assert unknown.startswith("config.json: clip.kind: 'perceiver' is not one of") and "clip_vit" in unknown
    other = refusal(parse_config, ModelConfig, with_kind("clip_resnet"), "config.json")
    assert other.startswith("config.json: clip.vision.heads: no such key")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_pipes_and_devices_are_no_models(tmp_path, model_folder):
    """Reading one might never end; a script's mistake, or a hostile archive's."""
    for name in ("a.pth", "a.safetensors", "a.bin", "a"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}: not a regular file"):
            load_model(tmp_path / name)
    for name in ("model.safetensors", "config.json"):
        folder = tmp_path / f"with {name}"
        shutil.copytree(model_folder, folder)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(UserError, match=rf"{name}: not a regular file"):
            load_model(folder)
    (tmp_path / "zero.pth").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"zero\.pth: not a regular file"):
        load_model(tmp_path / "zero.pth")


@pytest.mark.parametrize("member", ["archive/data/0", "archive/data.pkl", "archive/other"])
def test_a_zip_bomb_costs_no_memory(tmp_path, member):
    torch.save({"model": {"a": torch.zeros(4)}}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
        for info in plain.infolist():
            if not info.filename.endswith(member.removeprefix("archive")):
                bomb.writestr(info.filename, plain.read(info))
        info = zipfile.ZipInfo(member)
        info.compress_type = zipfile.ZIP_DEFLATED
        bomb.writestr(info, bytes(50_000_000))
    assert (tmp_path / "bomb.pth").stat().st_size < 100_000
    tracemalloc.start()
    with pytest.raises(UserError, match=r"bomb\.pth: refused: compressed, it unpacks to 50,0"):
        load_model(tmp_path / "bomb.pth")
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
