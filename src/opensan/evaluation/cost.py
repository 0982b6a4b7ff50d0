"""Measure the cost of a model: parameters, multiply-adds by part, memory, images a second.

Operations are counted in a real run, without memory (on torch's meta device), so a cheaper way of computing the
same result shows here. Letters: Q queries, K words, H W the padded network image.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from opensan.assemble.labels import label_map
from opensan.checkpoints import build_empty, load_model, random_model
from opensan.checkpoints.presets import PRESETS
from opensan.config import ModelConfig
from opensan.model import SAN
from opensan.segmenters.baselines import Baseline, parse_baseline
from opensan.segmenters.baselines.build import baseline_stages, build_baseline
from opensan.segmenters.san import SanSegmenter
from opensan.structures import ImageSizes, Proposals, TextClassifier
from opensan.text.rows import TextRows
from opensan.train.log import peak_memory_mib
from opensan.vocabulary import Vocabulary

OFFICIAL_SIZE = (640, 640)

LABEL_MAP = "label map"
MOST_SECONDS = 10.0
LEAST_RUNS = 3


@dataclass(frozen=True)
class Parameters:
    """Parameters of a part of the model."""

    total: int
    trained: int


@dataclass(frozen=True)
class Timing:
    """One image at a time through the whole of `Segmenter.segment`, with words that are embedded already."""

    images_per_second: float
    """The inverse of the median of `seconds`."""
    seconds: tuple[float, ...]
    """Seconds of each run."""
    peak_memory_mib: float
    """Peak memory of the device if it counts it, else of this whole process; nan if unknown."""
    device: str
    threads: int


@dataclass(frozen=True)
class Profile:
    """Cost of a model."""

    model: str
    size: tuple[int, int]
    """Height and width of the padded network image, which is also the label map's size."""
    words: int
    parameters: dict[str, Parameters]
    """Parameters by part; "all" is their sum."""
    multiply_adds: dict[str, int]
    """Multiply-adds by part, for one image; the label map's are for flat class probabilities, the worst case."""
    speed: Timing

    @property
    def multiply_adds_without_label_map(self) -> int:
        """Multiply-adds as papers count them."""
        return sum(count for part, count in self.multiply_adds.items() if part != LABEL_MAP)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        total = self.multiply_adds_without_label_map
        plain = asdict(self)
        plain["multiply_adds_without_label_map"] = total
        plain["flops_without_label_map"] = 2 * total
        plain["official"] = official_figures(self.model)
        return plain


def official_figures(name: str) -> dict[str, float] | None:
    """Return the authors' figures of the model of this name (`Official.figures`), None if there are none."""
    preset = PRESETS.get(name)
    return dict(preset.official.figures) if preset and preset.official else None


def profile(source: str, *, size: tuple[int, int] = OFFICIAL_SIZE, words: int = 171, device: str = "cpu") -> Profile:
    """Profile a model.

    Args:
        source: as for `opensan.load`, baselines included. Presets are built with random weights, which cost as much as
            trained ones.
        size: height and width of the network image; sides are rounded up to what the model can take.
        words: K, embedded already.
        device: where speed and memory are measured.

    Raises:
        ValueError: an unknown model or device; one line.
    """
    baseline = parse_baseline(source)
    weights = source if baseline is None else baseline.model
    model = random_model(weights, 0) if weights in PRESETS else load_model(weights)
    config = model.config
    divisor = config.image.size_divisor
    height, width = (-(-side // divisor) * divisor for side in size)
    size = (height, width)
    if baseline is None:
        multiply_adds = count_multiply_adds(config, size, words)
    else:
        multiply_adds = count_baseline(baseline, config, size, words)
    return Profile(
        model=config.name if baseline is None else f"{baseline.name}:{config.name}",
        size=size,
        words=words,
        parameters=count_parameters(model, baseline),
        multiply_adds=multiply_adds,
        speed=measure_speed(model, size, words, device, baseline),
    )


def count_parameters(model: SAN, baseline: Baseline | None = None) -> dict[str, Parameters]:
    """Count parameters by part, "all" last; the scale of CLIP's logits counts with the image tower.

    No baseline trains anything in CLIP, and `maskclip` trains and uses nothing else.
    """
    own = {} if baseline is not None and baseline.method == "maskclip" else _OWN_PARTS
    totals = {part: [0, 0] for part in ("CLIP image tower", "CLIP text tower", *own.values())}
    for name, parameter in model.named_parameters():
        part = _part_of(model, name)
        if part not in totals:
            continue
        trained = parameter.requires_grad and (baseline is None or not part.startswith("CLIP"))
        totals[part][0] += parameter.numel()
        totals[part][1] += parameter.numel() * trained
    total, trained = (sum(counts) for counts in zip(*totals.values(), strict=True))
    return {part: Parameters(*counts) for part, counts in totals.items()} | {"all": Parameters(total, trained)}


_OWN_PARTS = {"side_adapter": "side adapter", "no_object_embedding": "no-object embedding"}


def _part_of(model: SAN, name: str) -> str:
    """Return the part that the parameter `name` belongs to; which names are the text tower's, its backbone knows."""
    owner, _, rest = name.partition(".")
    if owner != "clip":
        return _OWN_PARTS[owner]
    return "CLIP text tower" if model.clip.is_text(rest) else "CLIP image tower"


def count_multiply_adds(config: ModelConfig, size: tuple[int, int], words: int) -> dict[str, int]:
    """Count multiply-adds of matrix products, convolutions and attention for one image of `size` (H, W), by part.

    The label map is counted on random masks and flat class probabilities; all else depends on sizes alone.
    """
    model = build_empty(config)
    embed_dim = config.clip.embed_dim
    pixels = torch.empty(1, 3, *size, device="meta")
    blocks = config.side_adapter.supervised_blocks[-1:]
    rows = torch.empty(words, embed_dim, device="meta")
    text = TextClassifier(rows, torch.arange(words), words)
    with torch.no_grad():
        shallow, features = _counted(lambda: model.shallow_features(pixels))
        side, _ = _counted(lambda: model.side_adapter(pixels, features.maps, blocks))
        whole, proposals = _counted(lambda: model.propose(pixels))
        classification, _ = _counted(lambda: model.classify(proposals, text))
    adapter = {part: side.of(f"SideAdapter.{module}") for part, module in _ADAPTER_PARTS.items()}
    return {
        "CLIP, shallow layers": shallow.total,
        "side adapter: patches and positions": side.total - sum(adapter.values()),
        **adapter,
        "CLIP, recognition layers": whole.total - shallow.total - side.total,
        "classification": classification.total,
        LABEL_MAP: _count_label_map(proposals, size, words),
    }


def count_baseline(baseline: Baseline, config: ModelConfig, size: tuple[int, int], words: int) -> dict[str, int]:
    """Count a baseline's multiply-adds for one image of `size` (H, W), by part; every proposal counts as valid."""
    with torch.no_grad():
        stages = baseline_stages(baseline, build_empty(config), size, words)
        return {stage.name: _counted(stage.run)[0].total * stage.times for stage in stages}


_ADAPTER_PARTS = {
    "side adapter: blocks": "blocks",
    "side adapter: fusion": "fusion",
    "side adapter: heads": "head",
}


@dataclass(frozen=True)
class _Count:
    """Multiply-adds of a call, by module."""

    counter: FlopCounterMode

    @property
    def total(self) -> int:
        return self.counter.get_total_flops() // 2

    def of(self, module: str) -> int:
        """Return those of the modules below `module`, or of itself if it was called as a whole."""
        counts = {name: sum(operations.values()) for name, operations in self.counter.get_flop_counts().items()}
        if module in counts:
            return counts[module] // 2
        depth = module.count(".") + 1
        below = (count for name, count in counts.items() if name.startswith(module + ".") and name.count(".") == depth)
        return sum(below) // 2


def _counted(call: Callable[[], Any]) -> tuple[_Count, Any]:
    with FlopCounterMode(display=False) as counter:
        result = call()
    return _Count(counter), result


def _count_label_map(proposals: Proposals, size: tuple[int, int], words: int) -> int:
    generator = torch.Generator().manual_seed(0)
    masks = torch.randn(proposals.mask_logits.shape[1:], generator=generator)
    probabilities = torch.rand(len(masks), words, generator=generator).softmax(dim=1)
    return _counted(lambda: label_map(masks, probabilities, ImageSizes(size, size, size)))[0].total


class _EmbeddedWords:
    """Replaces a text encoder that has embedded the words already."""

    def __init__(self, words: int, embed_dim: int, device: torch.device) -> None:
        rows = F.normalize(torch.randn(words, embed_dim, generator=torch.Generator().manual_seed(0)), dim=1)
        self._classifier = TextClassifier(rows.to(device), torch.arange(words, device=device), words)

    def classifier(self, vocabulary: Vocabulary) -> TextClassifier:
        return self._classifier


def measure_speed(
    model: SAN, size: tuple[int, int], words: int, device: str = "cpu", baseline: Baseline | None = None
) -> Timing:
    """Time `segment`, SAN's or a baseline's, on an image of noise whose network image is itself, of `size` (H, W)."""
    image = model.config.image.model_copy(update={"short_side": min(size), "long_side": max(size)})
    model.config = model.config.model_copy(update={"image": image})
    segmenter: Any
    if baseline is None:
        segmenter = SanSegmenter(model, device=device, text_cache=False)
    else:
        segmenter = build_baseline(baseline, model, device=device, text_cache=False)
    segmenter.text = cast(TextRows, _EmbeddedWords(words, model.config.clip.embed_dim, segmenter.device))
    vocabulary = Vocabulary.parse([f"word {number}" for number in range(words)])
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    if segmenter.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(segmenter.device)
    segmenter.segment(noise, vocabulary)
    seconds: list[float] = []
    while len(seconds) < LEAST_RUNS or (sum(seconds) < MOST_SECONDS and len(seconds) < 50):
        start = time.perf_counter()
        segmenter.segment(noise, vocabulary)  # labels in the host's memory, so the device has finished
        seconds.append(time.perf_counter() - start)
    return Timing(
        images_per_second=1 / statistics.median(seconds),
        seconds=tuple(seconds),
        peak_memory_mib=peak_memory_mib(segmenter.device),
        device=str(segmenter.device),
        threads=torch.get_num_threads(),
    )
