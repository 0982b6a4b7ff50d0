"""The whole table of speeds on this machine, by one command, with the chip's own rates and the share of them reached.

    python bench/table.py [--rows b16-171 b16-847 l14-171 training folder start labels memory alternatives] [--pairs 7]
                          [--threads 1] [--clock processor] [--images 500] [--draws 24] [--json FILE]

*Plain* (bench/plain.py) stands for the official code. Each row of `segment` is a 640x640 image; plain and the three
speeds take turns in one process (bench/segment.py); ratios are medians of the rounds'. The image half's rate is its
operations, counted by torch, over the seconds of `encode`; its share is of the chip's float32 rate for `exact`, of its
bfloat16 rate for the others. With `--threads 1 --clock processor`, the default, other work on the machine disturbs
least; `--threads 2 --clock wall` is what a user waits for. The other rows are what training_step.py,
images_a_second.py (`--images`), startup.py, hard_labels.py (`--draws` of each image), memory.py and export.py of this
folder print. What `fast` changes in the answers of trained models, on data sets of your own, is measured by
fast_answers.py.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

import export
import segment
from segment import CLOCKS, SPEEDS, Ways, photograph, turns, vocabulary

BENCH = Path(__file__).parent
ROWS = {
    "b16-171": ("san-vit-b16", 171),
    "b16-847": ("san-vit-b16", 847),
    "l14-171": ("san-vit-l14", 171),
    "training": None,
    "folder": None,
    "start": None,
    "labels": None,
    "memory": None,
    "alternatives": None,
}
ALTERNATIVES = {"onnxruntime": ("onnx float32", "onnx int8"), "openvino": ("openvino float32", "openvino bfloat16")}
"""Library -> the ways that users could take instead, measured where it is installed. OpenVINO's int8 needs nncf too and
keeps half of the labels: it is left to bench/export.py."""
RATES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def measure(model: str, words: int, rates: dict[str, float], options: argparse.Namespace) -> dict[str, object]:
    """One case: whole `segment` of plain and all speeds in turn, then the image half of the speeds."""
    ways, image, asked = Ways(model), photograph(640, 640), vocabulary(words)
    names = ("plain", *SPEEDS)
    labels = {way: ways.segment(way, image, asked) for way in names}
    whole = turns({way: lambda way=way: ways.segment(way, image, asked) for way in names}, options.pairs, options.clock)
    halves = {speed: lambda san=san: san.encode(image) for speed, san in ways.segmenters.items()}
    half = turns(halves, options.pairs, options.clock)
    gflops = {speed: segment.image_half_gflop(model) / taken for speed, taken in half["seconds"].items()}
    return {
        "model": model,
        "words": words,
        **whole,
        "labels_alike": {way: float((labels[way] == labels["plain"]).mean()) for way in SPEEDS},
        "image_half_gflops": gflops,
        "share": {speed: gflops[speed] / rates["float32" if speed == "exact" else "bfloat16"] for speed in SPEEDS},
    }


def segment_rows(row: dict) -> list[str]:
    lines = [f"| {row['model']}, {row['words']} words | plain | {row['seconds']['plain']:.3f} | 1 | - | - | - |"]
    return lines + [
        f"| {row['model']}, {row['words']} words | {speed} | {row['seconds'][speed]:.3f} | {row['ratio'][speed]:.2f} "
        f"| {row['labels_alike'][speed]:.3%} | {row['image_half_gflops'][speed]:.0f} | {row['share'][speed]:.0%} |"
        for speed in SPEEDS
    ]


def run(*command: object) -> str:
    """Run a bench of this folder, and return what it prints."""
    return subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="processor")
    parser.add_argument("--images", type=int, default=500, help="of the folder")
    parser.add_argument("--draws", type=int, default=24, help="of words that nearly tie, for each image")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rates = {name: segment.multiplication_rate(dtype, clock=options.clock) for name, dtype in RATES.items()}
    unit = "GFLOP/s" if options.clock == "wall" else "GFLOP a processor second"
    has = {"AVX512-BF16": torch.cpu._is_avx512_bf16_supported(), "AMX": torch.cpu._is_amx_tile_supported()}
    able = " and ".join(name for name, there in has.items() if there) or "neither AVX512-BF16 nor AMX"
    print(f"{options.threads} threads, {options.clock} seconds; the processor has {able}.")
    print(f"A large matrix product: {', '.join(f'{rate:.0f} in {name}' for name, rate in rates.items())} ({unit}).\n")
    print("| case | way | s | plain / this | labels as plain | image half, GFLOP/s | share of the chip's rate |")
    print("|---|---|---|---|---|---|---|", flush=True)
    results: dict[str, object] = {"rates": rates}
    for name in options.rows:
        if ROWS[name]:
            results[name] = row = measure(*ROWS[name], rates, options)
            print("\n".join(segment_rows(row)), flush=True)
    if "training" in options.rows:
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = ["--pairs", options.pairs, "--threads", options.threads, "--clock", options.clock]
            command += ["--json", file.name]
            print("\n" + run(BENCH / "training_step.py", *command), flush=True)
            results["training"] = json.loads(Path(file.name).read_text())
    if "folder" in options.rows:
        command = ["--images", options.images, "--threads", options.threads, "--clock", options.clock]
        print("\nA folder:\n\n" + run(BENCH / "images_a_second.py", *command), flush=True)
    if "start" in options.rows:
        command = ["--runs", options.pairs]
        print("\nWhole processes, from start to exit:\n\n" + run(BENCH / "startup.py", *command), flush=True)
    if "labels" in options.rows:
        command = ["--draws", options.draws, "--threads", options.threads]
        print("\nLabels kept where words nearly tie:\n\n" + run(BENCH / "hard_labels.py", *command), flush=True)
    if "memory" in options.rows:
        for model in ("san-vit-b16", "san-vit-l14"):
            command = ["memory", "--model", model, "--threads", options.threads]
            print("\n" + run(BENCH / "segment.py", *command), flush=True)
        print("\nWhole processes, from `import torch` on, in GiB:\n" + run(BENCH / "memory.py"), flush=True)
    if "alternatives" in options.rows:
        ways = [way for library, offered in ALTERNATIVES.items() if find_spec(library) for way in offered]
        left_out = [library for library in ALTERNATIVES if not find_spec(library)]
        command = ["--threads", options.threads, "--clock", options.clock, "--rounds", options.pairs]
        if left_out:
            print(f"\nnot installed, so left out: {', '.join(left_out)}")
        print("\n" + run(BENCH / "export.py", *command, "--ways", *export.TORCH, *ways), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
