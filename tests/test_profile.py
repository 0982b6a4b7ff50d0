"""The model report: counts against formulas by hand, against the official code's figures, and how it is printed."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opensan.checkpoints import build_empty, save_folder
from opensan.checkpoints.presets import PRESETS
from opensan.cli import main
from opensan.evaluation.cost import count_multiply_adds, count_parameters
from plain import PlainSAN


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return exit_.value.code or 0


def test_multiply_adds_are_those_of_the_formulas(small_config):
    height, width, words = 96, 128, 7
    config, side = small_config, small_config.side_adapter
    clip = config.clip.vision
    c, patches = clip.width, (height // 2 // clip.patch_size) * (width // 2 // clip.patch_size)
    tokens = patches + 1
    queries = side.queries

    def block(length: int, channels: int) -> int:
        """qkv, output and MLP matrices; attention's two products."""
        return (3 + 1 + 8) * length * channels**2 + 2 * length**2 * channels

    def positions(table: int, h: int, w: int, channels: int) -> int:
        """A square table resized along one axis, then along the other."""
        return h * table * table * channels + w * table * h * channels

    grid = (height // 16) * (width // 16)
    w, m, hidden, heads = side.width, side.mask_channels, side.mlp_channels, clip.heads
    both = queries + tokens
    steered = 2 * queries * patches * c
    deep = 12 * both * c**2 + steered + 2 * tokens**2 * c
    last = (1 + 1 + 8) * queries * c**2 + 2 * both * c**2 + steered
    mlp = w * hidden + hidden * hidden
    expected = {
        "CLIP, shallow layers": patches * 3 * clip.patch_size**2 * c
        + 3 * block(tokens, c)
        + positions(
            clip.image_size // clip.patch_size, height // 2 // clip.patch_size, width // 2 // clip.patch_size, c
        ),
        "side adapter: patches and positions": grid * 3 * 16**2 * w
        + positions(side.image_size // 16, height // 16, width // 16, w),
        "side adapter: blocks": side.depth * block(queries + grid, w),
        "side adapter: fusion": len(side.fusion) * patches * c * w,
        "side adapter: heads": (
            (queries + grid) * (mlp + hidden * m)  # query and pixel MLPs
            + queries * m * grid  # mask logits
            + grid * mlp  # the attention MLP but its last layer, which is folded into the queries
            + heads * queries * m * (hidden + 1)
            + heads * queries * hidden * grid
        ),
        "CLIP, recognition layers": deep + last + queries * c * config.clip.embed_dim,
        "classification": queries * config.clip.embed_dim * (words + 1),
    }
    found = count_multiply_adds(config, (height, width), words)
    assert found.pop("label map") > 0
    assert found == expected


@pytest.mark.parametrize(("name", "fewer"), [("san-vit-b16", 0.05), ("san-vit-l14", 0.03)])
def test_presets_beside_the_official_figures(name, fewer):
    official = PRESETS[name].official.figures
    model = build_empty(PRESETS[name].config)
    with FlopCounterMode(display=False) as plain, torch.no_grad():
        PlainSAN(model).propose(torch.empty(1, 3, 640, 640, device="meta"))
    assert plain.get_total_flops() / 2 == pytest.approx(official["code"], abs=0.06e9)
    found = count_multiply_adds(PRESETS[name].config, (640, 640), 171)
    ours = sum(found.values()) - found["label map"]
    assert ours < (1 - fewer) * official["code"]
    parameters = count_parameters(model)
    assert parameters["all"].trained == official["trained"]
    assert parameters["all"].total == sum(parameter.numel() for parameter in model.parameters())
    assert parameters["CLIP text tower"].trained == 0
    assert parameters["CLIP image tower"].trained == model.clip.visual.positional_embedding.numel()


def test_the_command(tmp_path, small_model, capsys):
    save_folder(small_model, tmp_path / "small")
    before = (tmp_path / "small" / "config.json").read_bytes()
    assert run("profile", tmp_path / "small", "--size", "90x128", "--words", 5) == 0
    text = capsys.readouterr().out
    assert "one image of 96x128, 5 words" in text and "images a second" in text and "the paper" not in text
    assert run("profile", tmp_path / "small", "--size", "96x128", "--words", 5, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["size"] == [96, 128]
    assert found["flops_without_label_map"] == 2 * sum(
        count for part, count in found["multiply_adds"].items() if part != "label map"
    )
    assert found["speed"]["images_per_second"] > 0 and found["speed"]["peak_memory_mib"] > 1
    assert (tmp_path / "small" / "config.json").read_bytes() == before


@pytest.mark.parametrize("size", ["640", "0x640", "ax3", "640x99999"])
def test_a_size_that_is_none(size, capsys):
    assert run("profile", "tiny", "--size", size) == 2
    assert "height x width in pixels" in capsys.readouterr().err


def test_a_model_that_is_none(capsys):
    assert run("profile", "big") == 1
    assert "no model 'big'" in capsys.readouterr().err
