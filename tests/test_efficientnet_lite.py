"""EfficientNet-Lite against the library whose weights it reads, and as a SAN's backbone."""

import pytest
import torch

from opensan.config import EfficientNetLiteConfig, ImageConfig, ModelConfig, SideAdapterConfig, TextConfig
from opensan.errors import UserError
from opensan.model import SAN, build_san
from opensan.model.backbones.efficientnet_lite import EfficientNetLite, from_library, stages


def small_config(variant: str = "lite0") -> ModelConfig:
    """A SAN around a whole tower of `variant`, the rest of it small."""
    return ModelConfig(
        name="small",
        clip=EfficientNetLiteConfig(
            kind="efficientnet_lite", variant=variant, embed_dim=32, text=TextConfig(width=16, layers=1, heads=2)
        ),
        side_adapter=SideAdapterConfig(
            width=32,
            depth=2,
            heads=2,
            image_size=64,
            queries=6,
            fusion={0: 1, 1: 3},
            supervised_blocks=(1, 2),
            mask_channels=16,
            mlp_channels=16,
        ),
        recognition_layer=3,
        clip_scale=0.75,
        image=ImageConfig(short_side=64, mean=(127.0,) * 3, std=(128.0,) * 3),
    )


@pytest.fixture(scope="module")
def model() -> SAN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_san(small_config())


@pytest.mark.parametrize(("variant", "width"), [("lite0", 320), ("lite1", 320), ("lite2", 352)])
def test_the_library_gives_the_same_features_and_classes(variant: str, width: int):
    """Of random weights; sides that are odd on the way, too, where the padding has two halves."""
    library = pytest.importorskip("efficientnet_lite_pytorch")
    torch.manual_seed(1)
    theirs = library.EfficientNet.from_name(f"efficientnet-{variant}", image_size=None).eval()
    for name, tensor in theirs.state_dict().items():
        if name.endswith(("running_var", "running_mean")):
            tensor.uniform_(0.5, 1.5) if "var" in name else tensor.normal_(std=0.1)
    state, weight, bias = from_library(theirs.state_dict())
    ours = EfficientNetLite(variant).eval()
    ours.load_state_dict(state, strict=True)
    assert stages(variant)[-1].width == width
    for size in ((64, 96), (75, 101)):
        pixels = torch.rand(2, 3, *size) * 2 - 1
        with torch.inference_mode():
            features = ours.features(ours(pixels)[32])
            torch.testing.assert_close(features, theirs.extract_features(pixels), rtol=1e-4, atol=1e-5)
            logits = features.mean((2, 3)) @ weight.T + bias
            torch.testing.assert_close(logits, theirs(pixels), rtol=1e-4, atol=1e-5)


def test_a_bias_of_zeros_gives_the_image_embedding(model: SAN):
    with torch.inference_mode():
        features = model.shallow_features(torch.randn(1, 3, 96, 128))
        found = model.clip.recognise(features, torch.zeros(1, 1, 4, 6, 8))
        image = model.clip.embed(features.tokens.mean(dim=1))
    torch.testing.assert_close(found, image.unsqueeze(1).expand(-1, 4, -1), rtol=1e-5, atol=1e-6)


def test_a_strong_bias_reads_its_position_alone(model: SAN):
    with torch.inference_mode():
        features = model.shallow_features(torch.randn(1, 3, 128, 128))
        bias = torch.full((1, 1, 1, *features.grid), -50.0)
        bias[..., 1, 2] = 50.0
        found = model.clip.recognise(features, bias)[0, 0]
        wanted = model.clip.embed(features.tokens[0, features.grid[1] + 2])
    torch.testing.assert_close(found, wanted)


def test_only_the_side_adapter_and_the_no_object_row_are_trained(model: SAN):
    trained = {one.name.split(".")[0] for one in model.trained()}
    assert trained == {"side_adapter", "no_object_embedding"}


def test_missing_and_surplus_tensors_are_named():
    torch.manual_seed(0)
    library = pytest.importorskip("efficientnet_lite_pytorch")
    state = library.EfficientNet.from_name("efficientnet-lite0").state_dict()
    with pytest.raises(UserError, match=r"no tensor _blocks\.3\._bn1\.bias"):
        from_library({name: tensor for name, tensor in state.items() if name != "_blocks.3._bn1.bias"})
    with pytest.raises(UserError, match=r"does not: _extra\.weight"):
        from_library({**state, "_extra.weight": torch.zeros(1)})


def test_the_configuration_survives_json_and_is_checked():
    config = small_config()
    assert ModelConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValueError, match="recognition_layer 2 is not 3"):
        ModelConfig.model_validate({**config.model_dump(), "recognition_layer": 2})
