"""What several test files share."""

import os
import threading
from pathlib import Path

import pytest
import torch

from opensan.config import ClipConfig, ImageConfig, ModelConfig, SideAdapterConfig, TextConfig, VisionConfig

torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))

# Where the first gradient of a process comes after torch.export, torch refuses gradients in the processes it forks,
# which tests of several processes need. So the first one comes now.
torch.ones(1, requires_grad=True).sum().backward()

SHARED = Path(__file__).parents[1].parent / "shared"
GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's text cache."""
    monkeypatch.setenv("OPENSAN_CACHE", str(tmp_path / "text-cache"))


@pytest.fixture(scope="session")
def small_config() -> ModelConfig:
    """A SAN of a second or less: every part present, every number different from its neighbours."""
    return ModelConfig(
        name="small",
        clip=ClipConfig(
            embed_dim=24,
            quick_gelu=True,
            vision=VisionConfig(width=32, layers=5, heads=4, patch_size=8, image_size=64),
            text=TextConfig(width=16, layers=2, heads=2),
        ),
        side_adapter=SideAdapterConfig(
            width=48,
            depth=4,
            heads=3,
            image_size=96,
            queries=10,
            fusion={0: 0, 1: 1, 2: 3},
            supervised_blocks=(3, 4),
            mask_channels=20,
            mlp_channels=28,
        ),
        recognition_layer=3,
        clip_scale=0.5,
        image=ImageConfig(short_side=96, long_side=384),
    )


def lively_model(config: ModelConfig):
    """Build a SAN with random weights of a seed, one of forty tried, with which proposals and words differ."""
    from opensan.model import build_san

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(32)
        model = build_san(config)
        for name, parameter in model.named_parameters():
            if name.startswith("side_adapter") and parameter.ndim > 1:
                parameter.data.normal_(std=parameter[0].numel() ** -0.5)
    return model


@pytest.fixture(scope="session")
def small_model(small_config):
    """A lively model of `small_config`. Not to be changed."""
    return lively_model(small_config)


@pytest.fixture(scope="session")
def model_folder(small_model, tmp_path_factory) -> Path:
    """`small_model` on disk. Not to be changed."""
    from opensan.checkpoints import save_folder

    return save_folder(small_model, tmp_path_factory.mktemp("model"))


@pytest.fixture
def fresh_model(small_config):
    """Makes `small_config` with the same seeded weights each time."""
    from opensan.model import build_san

    def build():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return build_san(small_config)

    return build


@pytest.fixture
def run(capsys):
    """Run a command line in this process: (exit code, stdout, stderr)."""

    from opensan.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return run


@pytest.fixture
def held(segmenter, monkeypatch):
    """A segmenter whose network waits until it is let go."""
    gate = threading.Event()
    through = segmenter.encode_prepared

    def waiting(*arguments):
        assert gate.wait(30)
        return through(*arguments)

    monkeypatch.setattr(segmenter, "encode_prepared", waiting)
    yield gate
    gate.set()
