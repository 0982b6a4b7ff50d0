"""What `speed` changes, and what it leaves alone."""

import copy
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import opensan
from opensan.model import transformer
from opensan.model.identity import model_identity
from opensan.segmenters import image_half, san

SCENE = Path(opensan.__file__).parent / "assets" / "scenes" / "playground.png"
WORDS = "night sky,brick,green heart,white heart,orange circle,orange cross,red square"


def load_tiny(**options) -> "opensan.segmenters.san.SanSegmenter":
    return opensan.load("tiny", text_cache=False, **options)


@pytest.fixture
def bfloat16_cpu(monkeypatch):
    """A processor that says it multiplies bfloat16, whatever this one is."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)


@pytest.fixture
def float32_cpu(monkeypatch):
    """A processor that has float32 alone."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.mark.parametrize("speed", ["fast", "fastest"])
def test_fast_labels_nearly_alike(bfloat16_cpu, speed):
    exact, fast = load_tiny().segment(SCENE, WORDS), load_tiny(speed=speed).segment(SCENE, WORDS)
    agreement = (exact.labels == fast.labels).mean()
    assert agreement > 0.99
    assert not np.array_equal(exact.encoding.mask_logits, fast.encoding.mask_logits)
    assert fast.encoding.mask_logits.dtype == fast.encoding.mask_embeddings.dtype == torch.float32


@torch.inference_mode()
@pytest.mark.parametrize("cached_logits", [2**20, 300])
def test_narrow_attention_is_attention(monkeypatch, cached_logits):
    """In blocks of any size; and keys that are all moved alike, as trained ones are, cost no exactness."""
    monkeypatch.setattr(transformer, "CACHED_LOGITS", cached_logits)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 50, 24, generator=generator).bfloat16()
    k += 8
    found = transformer.attention(q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    assert (found - expected).abs().max() < 0.02


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({"speed": "fast"}, ("clip.visual.transformer.resblocks.",)),
        ({"speed": "fastest"}, ("clip.visual.transformer.resblocks.", "side_adapter.blocks.")),
        ({"dtype": "bfloat16"}, ("clip.visual.transformer.resblocks.", "side_adapter.blocks.")),
    ],
)
def test_speeds_narrow_their_blocks_matrices_and_nothing_else(bfloat16_cpu, options, blocks):
    exact, fast = load_tiny().model.state_dict(), load_tiny(**options).model.state_dict()
    narrow = {name for name, tensor in fast.items() if tensor.dtype == torch.bfloat16}
    assert narrow == {name for name, tensor in exact.items() if name.startswith(blocks) and tensor.ndim == 2}
    for name in exact.keys() - narrow:
        assert torch.equal(exact[name].to_dense(), fast[name].to_dense()), name


def test_matrices_lie_as_onednn_multiplies_by_them(bfloat16_cpu):
    """All but one, whose rows are used in two parts."""
    for options in ({}, {"speed": "fastest"}):
        state = load_tiny(**options).model.state_dict()
        blocks = ("clip.visual.transformer.resblocks.", "side_adapter.blocks.")
        matrices = {name for name, tensor in state.items() if name.startswith(blocks) and tensor.ndim == 2}
        (strided,) = (name for name in matrices if not state[name].is_mkldnn)
        assert strided.endswith("attn.in_proj_weight")


@torch.inference_mode()
def test_packed_matrix_multiplies_as_it_did():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 40, 64, generator=generator), torch.randn(96, 64, generator=generator)
    bias = torch.randn(96, generator=generator)
    packed = transformer.pack(weight)
    assert packed.is_mkldnn and torch.equal(packed.to_dense(), weight)
    for silu in (False, True):
        expected = x @ weight.T + bias
        expected = expected * expected.sigmoid() if silu else expected
        assert torch.allclose(transformer.linear(x, packed, bias, silu=silu), expected, atol=1e-5)
    block = transformer.SideBlock(64, 4, 2, 1e-6)
    q, k = block._project(x, 0, 1), block._project(x, 1, 3)
    block.attn.qkv.weight = torch.nn.Parameter(transformer.pack(block.attn.qkv.weight.data), requires_grad=False)
    for expected, found in zip((*q, *k), (*block._project(x, 0, 1), *block._project(x, 1, 3)), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


def test_identity_is_that_of_the_unpacked_model():
    san = load_tiny()
    assert model_identity(san.model) == san.identity


@pytest.mark.parametrize("speed", ["fast", "fastest"])
def test_fast_is_exact_where_nothing_is_faster_and_says_so(float32_cpu, speed):
    with pytest.warns(UserWarning, match=r'speeds "fast" and "fastest" are the same as "exact" here'):
        fast = load_tiny(speed=speed)
    assert fast.dtype == torch.float32
    assert np.array_equal(fast.segment(SCENE, WORDS).labels, load_tiny().segment(SCENE, WORDS).labels)


def test_a_segmenters_own_gpu_is_the_current_one_while_it_works(monkeypatch):
    entered = []

    @contextmanager
    def current(device):
        entered.append(device)
        yield
        entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", current)
    device = torch.device("cuda:1")
    work = san.undisturbed(lambda self: list(entered))
    assert work(SimpleNamespace(device=device)) == [device]
    assert entered == [device, None]
    assert work(SimpleNamespace(device=torch.device("cpu"))) == entered


def test_on_cuda_fast_is_the_fastest(small_model, monkeypatch):
    """A GPU has bfloat16 to spare, and its answers were measured with all blocks narrow."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    monkeypatch.setattr(image_half, "CudaGraphs", lambda function: function)
    states = []
    for speed in ("fast", "fastest"):
        model = copy.deepcopy(small_model)
        image_half.prepare_image_half(model, torch.device("cuda"), speed, torch.bfloat16)
        states.append({name: tensor.dtype for name, tensor in model.state_dict().items()})
    assert states[0] == states[1]
    assert states[0]["side_adapter.blocks.0.attn.qkv.weight"] == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_too_a_dtype_given_decides(small_model, monkeypatch, dtype):
    entered = []

    def autocast(device, **options):
        entered.append((device, options))
        return nullcontext()

    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    monkeypatch.setattr(image_half, "CudaGraphs", lambda function: function)
    propose = image_half.prepare_image_half(copy.deepcopy(small_model), torch.device("cuda"), "fast", dtype)
    with torch.no_grad():
        propose(torch.zeros(1, 3, 96, 96))
    assert entered == [("cuda", {"dtype": torch.bfloat16, "enabled": dtype is torch.bfloat16})]


def test_a_dtype_given_decides(bfloat16_cpu):
    assert load_tiny(speed="fast", dtype="float32").dtype == torch.float32
    assert load_tiny(dtype="bfloat16").dtype == torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_tiny().dtype == torch.float32
