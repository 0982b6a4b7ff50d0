"""The image half on CUDA: compiled, recorded, and shared by threads."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import opensan
from opensan.segmenters.image_half import CudaGraphs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@torch.inference_mode()
def test_replays_answer_as_the_function_whatever_the_shape(small_model):
    model = small_model.to("cuda")
    try:
        graphs = CudaGraphs(model.propose)
        batches = [torch.randn(b, 3, h, w, device="cuda") for b, h, w in ((1, 96, 96), (2, 96, 128), (1, 96, 96))]
        for pixels in batches:
            torch.testing.assert_close(graphs(pixels).mask_logits, model.propose(pixels).mask_logits)
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(torch.inference_mode()(graphs), batches))
        for pixels, proposals in zip(batches, found, strict=True):
            torch.testing.assert_close(proposals.mask_embeddings, model.propose(pixels).mask_embeddings)
    finally:
        model.to("cpu")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("speed", ["exact", "fast"])
def test_a_gpu_that_is_not_the_current_one_answers_as_the_first(speed):
    words = "night sky,brick,green heart,white heart"
    scene = Path(opensan.__file__).parent / "assets" / "scenes" / "playground.png"
    first, second = (opensan.load("tiny", device=f"cuda:{n}", speed=speed, text_cache=False) for n in (0, 1))
    assert (first.segment(scene, words).labels == second.segment(scene, words).labels).mean() > 0.999
