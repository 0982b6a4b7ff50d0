"""What an accelerator gives: images a second, share of its matrix rate, agreement of labels, training steps.

    python bench/device.py --out FOLDER [--parts rate,parity,labels,image,segment,text,agreement,training]
        [--models san-vit-b16,san-vit-l14] [--batches 1,8,32] [--device cuda]
        [--photographs FOLDER]

Plain is the official order in float32 (bench/plain.py), without TF32. Times are medians between device events, images
of 640 x 640 and random weights. FLOPs are counted on our own forward pass in float32, two for a multiply-add. Each part
writes its JSON as soon as it is done; a part that fails is named, and the others go on.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import opensan
from opensan.assemble.best_row import best_row
from opensan.assemble.labels import label_map
from opensan.assemble.scores import score_maps
from opensan.checkpoints import load_model
from opensan.checkpoints.presets import PRESETS
from opensan.parity.golden import golden_model
from opensan.parity.inference import CLEAR_MARGIN, check_inference, is_training
from opensan.segmenters.san import SanSegmenter
from opensan.structures import ImageSizes, Proposals, TextClassifier
from opensan.vocabulary import Vocabulary
from plain import PlainSAN

ROOT = Path(__file__).parents[1]
SIDE = 640
SCENE_WORDS = "night sky,brick,green heart,white heart,orange circle,orange cross,red square,grass,sand"
SIZES = ImageSizes((SIDE, SIDE), (SIDE, SIDE), (SIDE, SIDE))
Options = argparse.Namespace


def milliseconds(action: Callable[[], object], device: torch.device, runs: int = 7) -> float:
    """Median of `runs`, after two to warm up, on the device's clock."""
    taken = []
    for number in range(runs + 2):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            action()
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            begun = time.perf_counter()
            action()
            elapsed = (time.perf_counter() - begun) * 1000
        if number >= 2:
            taken.append(elapsed)
    return statistics.median(taken)


def load(model: str, options: Options, speed: str = "exact") -> SanSegmenter:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights
        return opensan.load(model, random_weights=0, device=options.device, speed=speed, text_cache=False)


def matrix_rate(dtype: torch.dtype, options: Options) -> float:
    """TFLOP/s of a large product of random numbers."""
    side = 8192 if options.device != "cpu" else 512
    a, b = (torch.randn(side, side, device=options.device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / milliseconds(lambda: a @ b, torch.device(options.device), 15) / 1e9


def rate(options: Options) -> dict:
    return {str(dtype).removeprefix("torch."): matrix_rate(dtype, options) for dtype in (torch.float32, torch.bfloat16)}


def pixels_of(batch: int, options: Options) -> Tensor:
    generator = torch.Generator(options.device).manual_seed(batch)
    return torch.randn(batch, 3, SIDE, SIDE, generator=generator, device=options.device)


def unit_rows(words: int, width: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(words)
    return F.normalize(torch.randn(words, width, generator=generator), dim=-1).to(device)


@torch.inference_mode()
def image(options: Options) -> dict:
    """The image half alone."""
    device = torch.device(options.device)
    found, ceiling = {}, matrix_rate(torch.bfloat16, options)
    for name in options.models:
        exact = load(name, options)
        plain = PlainSAN(exact.model)
        with FlopCounterMode(display=False) as counter:
            exact.model.propose(pixels_of(1, options))
        flops = counter.get_total_flops()
        times = {
            batch: [
                milliseconds(partial(plain.propose, p), device),
                milliseconds(partial(exact.model.propose, p), device),
            ]
            for batch in options.batches
            for p in [pixels_of(batch, options)]
        }
        fast = load(name, options, "fast")
        for batch in options.batches:
            p = pixels_of(batch, options)
            start = time.perf_counter()
            fast._propose(p)
            first = time.perf_counter() - start
            quick = milliseconds(partial(fast._propose, p), device, 15)
            slow, ours = times[batch]
            found[f"{name} batch {batch}"] = {
                "plain_float32_images_s": 1000 * batch / slow,
                "exact_images_s": 1000 * batch / ours,
                "fast_images_s": 1000 * batch / quick,
                "fast_to_plain": slow / quick,
                "gflop_an_image": flops / 1e9,
                "tflops": flops * batch / quick / 1e9,
                "share_of_bfloat16_rate": flops * batch / quick / 1e9 / ceiling,
                "first_call_s": first,
            }
    return found


@torch.inference_mode()
def segment(options: Options) -> dict:
    """The image half, classes and label maps; labels stay on the device, as the plain side's do."""
    device = torch.device(options.device)
    found = {}
    for name in options.models:
        exact = load(name, options)
        plain = PlainSAN(exact.model)
        fast = load(name, options, "fast")
        for words in (171, 847):
            rows = unit_rows(words, exact.model.config.clip.embed_dim, options.device)
            text = TextClassifier(rows, torch.arange(words, device=options.device), words)

            def label(
                segmenter: SanSegmenter, propose: Callable[[Tensor], Proposals], p: Tensor, text: TextClassifier = text
            ) -> list[Tensor]:
                proposals = propose(p)
                probabilities = segmenter.model.classify(proposals, text).softmax(-1)[..., :-1].float()
                masks = proposals.mask_logits.float()
                return [label_map(m, q, SIZES) for m, q in zip(masks, probabilities, strict=True)]

            def plain_label(p: Tensor, rows: Tensor = rows, plain: PlainSAN = plain) -> list[Tensor]:
                proposals = plain.propose(p)
                single = (
                    Proposals(m[None], e[None])
                    for m, e in zip(proposals.mask_logits, proposals.mask_embeddings, strict=True)
                )
                return [plain.label_map(one, rows, SIZES) for one in single]

            for batch in options.batches:
                p = pixels_of(batch, options)
                slow = milliseconds(partial(plain_label, p), device, 5)
                ours = milliseconds(partial(label, exact, exact.model.propose, p), device, 5)
                quick = milliseconds(partial(label, fast, fast._propose, p), device, 9)
                found[f"{name} batch {batch}, {words} words"] = {
                    "plain_float32_images_s": 1000 * batch / slow,
                    "exact_images_s": 1000 * batch / ours,
                    "fast_images_s": 1000 * batch / quick,
                    "exact_to_plain": slow / ours,
                    "fast_to_plain": slow / quick,
                }
        photograph = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        vocabulary = Vocabulary.ready("coco_stuff_171")
        for segmenter, speed in ((exact, "exact"), (fast, "fast")):
            segmenter.segment(photograph, vocabulary)
            begun = time.perf_counter()
            for _ in range(10):
                segmenter.segment(photograph, vocabulary)
            found[f"{name}, SanSegmenter.segment of an array, 171 words, {speed}"] = {
                "milliseconds": (time.perf_counter() - begun) * 100
            }
    return found


@torch.inference_mode()
def labels(options: Options) -> dict:
    """The label map alone, and the kernel against float64."""
    device = torch.device(options.device)
    found = {}
    for words in (3, 171, 847):
        generator = torch.Generator(options.device).manual_seed(words)
        masks = 4 * torch.randn(100, SIDE // 16, SIDE // 16, generator=generator, device=options.device)
        logits = 2 * torch.randn(100, words + 1, generator=generator, device=options.device)
        probabilities = logits.softmax(-1)[:, :-1]
        weights = probabilities.T.contiguous()
        columns = torch.rand(100, 50_001, generator=generator, device=options.device)
        scores = weights.double() @ columns.double()
        best = best_row(weights, columns)
        loss = scores.max(0).values - scores.gather(0, best[None])[0]
        full = torch.rand(100, SIDE * SIDE, generator=generator, device=options.device)
        found[f"{words} words"] = {
            "label_map_ms": milliseconds(lambda m=masks, q=probabilities: label_map(m, q, SIZES), device),
            "best_row_ms": milliseconds(lambda w=weights, f=full: best_row(w, f), device),
            "matrix_and_argmax_ms": milliseconds(lambda w=weights, f=full: (w @ f).argmax(0), device),
            "worst_loss_of_score": float(loss.max()),
            "of_pixels_not_the_first_maximum": float((best != scores.argmax(0)).float().mean()),
        }
    return found


def parity(options: Options) -> dict:
    """The recorded answers of the official code, on the device in float32: largest difference, and the limit."""
    found = {}
    for path in sorted([*(ROOT / "tests" / "goldens").glob("*.npz"), *options.goldens]):
        if not is_training(path):
            rows = check_inference(path, options.device)
            found[path.stem] = {row.name: f"{row.value:.1e} of {row.limit:.0e}" for row in rows}
            found[path.stem]["passed"] = all(row.passed for row in rows)
    return found


@torch.inference_mode()
def agreement(options: Options) -> dict:
    """Share of pixels labelled on the device, exact and fast, as on the CPU: weights of the goldens' rule, and tiny."""
    paths = sorted(options.photographs.iterdir()) if options.photographs else []
    scenes = sorted((ROOT / "src" / "opensan" / "assets" / "scenes").glob("*.png"))
    found = {}
    for name, words, files in (
        ("san-vit-b16", Vocabulary.ready("coco_stuff_171"), paths or scenes),
        ("san-vit-l14", Vocabulary.ready("coco_stuff_171"), paths[:4] or scenes),
        ("tiny", Vocabulary.parse(SCENE_WORDS), scenes),
    ):
        if name not in (*options.models, "tiny"):
            continue
        make = (
            (lambda: load_model("tiny")) if name == "tiny" else (lambda name=name: golden_model(PRESETS[name].config))
        )
        cpu = SanSegmenter(make(), text_cache=False)
        exact, fast = (
            SanSegmenter(make(), device=options.device, speed=s, text_cache=False) for s in ("exact", "fast")
        )
        pixels, clear_errors, fast_same = 0, 0, 0
        begun = time.perf_counter()
        for file in files:
            encoding = cpu.encode(file)
            scores = score_maps(encoding.mask_logits, cpu.class_probabilities(encoding, words), encoding.sizes)
            best = scores.topk(2, dim=0)
            expected = best.indices[0].numpy()
            clear = (best.values[0] - best.values[1]).numpy() > CLEAR_MARGIN
            pixels += expected.size
            clear_errors += int(((exact.segment(file, words).labels != expected) & clear).sum())
            fast_same += int((fast.segment(file, words).labels == expected).sum())
        found[f"{name}, {len(files)} photographs"] = {
            "clear pixels that exact labels otherwise": clear_errors,
            "fast_agreement": fast_same / pixels,
            "seconds": time.perf_counter() - begun,
        }
    return found


def text(options: Options) -> dict:
    """847 names with 14 templates, cold: seconds."""
    segmenter = load("san-vit-b16", options)
    segmenter.text.classifier(Vocabulary.parse(["warm-up"]))
    begun = time.perf_counter()
    segmenter.text.classifier(Vocabulary.ready("ade20k_847"))
    return {"847 names, 14 templates": {"seconds": time.perf_counter() - begun}}


def training(options: Options) -> dict:
    """Seconds and peak memory of a B/16 step, in processes of their own."""
    found = {}
    step = [sys.executable, str(Path(__file__).with_name("training_step.py")), "--device", options.device]
    cases = [("plain", 2, []), ("ours", 2, []), ("plain", 8, []), ("ours", 8, []), ("ours", 16, [])]
    cases += [("plain", 8, ["--bfloat16"]), ("ours", 8, ["--bfloat16"]), ("ours", 16, ["--bfloat16"])]
    for which, batch, more in cases:
        command = [*step, "--only", which, "--batch", str(batch), "--steps", "7", *more]
        done = subprocess.run(command, capture_output=True, text=True)
        key = f"{which}, batch {batch}, {'bfloat16' if more else 'float32'}"
        found[key] = json.loads(done.stdout) if done.returncode == 0 else {"failed": done.stderr[-300:]}
    return found


PARTS = {part.__name__: part for part in (rate, parity, labels, image, segment, text, agreement, training)}


def show(name: str, rows: dict) -> None:
    print(f"\n## {name}")
    for key, value in rows.items():
        cells = value if isinstance(value, dict) else {"": value}
        shown = (f"{what} {x:.4g}" if isinstance(x, float) else f"{what} {x}" for what, x in cells.items())
        print(f"{key}: {', '.join(shown)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--models", default="san-vit-b16,san-vit-l14", type=lambda text: text.split(","))
    parser.add_argument("--batches", default="1,8,32", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--goldens", type=Path, nargs="*", default=[], help="more recorded answers, for part parity")
    parser.add_argument("--photographs", type=Path, help="a folder for part agreement; default: the packaged scenes")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in options.parts.split(","):
        begun = time.perf_counter()
        try:
            rows = PARTS[name](options)
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        (options.out / f"{name}.json").write_text(json.dumps(rows, indent=2))
        show(f"{name} ({time.perf_counter() - begun:.0f} s)", rows)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
