"""Is this tree as fast as another one? Two processes, one a tree, do the same work turn by turn; medians of the pairs.

    git worktree add ../before COMMIT
    python bench/against.py ../before/src [--pairs 9] [--threads 1] [--tasks segment relabel labels step]

Rows, for san-vit-b16 with random weights and an image of noise of 640x640, and for `tiny` with a packaged scene, each
with 20 and with 171 words,

- `segment`: the whole, words embedded already.
- `relabel`: `Segmentation.relabel` with as many other words, embedded already.
- `labels`: class probabilities and labels of an encoding.

and one row `step`, for san-vit-b16: forward, losses, backward and optimizer on one crop of 640x640 with 171 classes, as
`bench/training_step.py` takes it.

Seconds are those of the processor: with one thread, other work on the machine hardly changes them. The ratio is this
tree's seconds by the other's: below 1, this tree is faster.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[1] / "src"

WORKER = """
import sys, time, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import numpy as np
import torch
import opensan
torch.set_num_threads(int(sys.argv[1]))
scene = Path(opensan.__file__).parent / "assets/scenes/court.png"
noise = np.random.default_rng(0).integers(0, 256, (640, 640, 3), dtype=np.uint8)
words = opensan.Vocabulary.ready("ade20k_847").names
state = {}
def made(model, count):
    if model not in state:
        seed = None if model == "tiny" else 0
        state[model] = opensan.load(model, random_weights=seed, text_cache=False)
    if (model, count) not in state:
        image = str(scene) if model == "tiny" else noise
        parts = words[:count], words[count : 2 * count]
        first, second = (opensan.Vocabulary.parse(part, templates="single") for part in parts)
        segmentation = state[model].segment(image, first)
        segmentation.relabel(second)
        state[model, count] = image, first, second, segmentation
    return state[model], *state[model, count]
def trained():
    if "step" not in state:
        from training_step import build_adamw, san_parameter_groups, step_function
        model = opensan.load("san-vit-b16", random_weights=0, text_cache=False).model.snapshot()
        for part in (model.side_adapter, model.no_object_embedding, model.clip.visual.positional_embedding):
            part.requires_grad_(True)
        groups = san_parameter_groups(model.train())
        losses = step_function("ours", model, 1, torch.device("cpu"))
        state["step"] = losses, build_adamw(groups), [one for group in groups for one in group.parameters]
    return state["step"]
def step():
    from training_step import clip_gradients
    losses, optimizer, parameters = trained()
    torch.manual_seed(0)
    optimizer.zero_grad(set_to_none=True)
    sum(losses().values()).backward()
    clip_gradients(parameters, 0.01)
    optimizer.step()
for line in sys.stdin:
    task, model, count = line.split()
    if task == "step":
        trained()
        start = time.process_time()
        step()
        print(time.process_time() - start, flush=True)
        continue
    segmenter, image, first, second, segmentation = made(model, int(count))
    start = time.process_time()
    if task == "segment":
        segmenter.segment(image, first)
    elif task == "relabel":
        segmentation.relabel(second)
    else:
        segmenter.winners(segmentation.encoding, first)
    print(time.process_time() - start, flush=True)
"""


def worker(source: Path, threads: int) -> subprocess.Popen[str]:
    paths = os.pathsep.join((str(source), str(source.parent / "bench")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", WORKER, str(threads)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def seconds(process: subprocess.Popen[str], task: str) -> float:
    print(task, file=process.stdin, flush=True)
    return float(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="the src folder of the other tree")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", default=["segment", "relabel", "labels", "step"])
    options = parser.parse_args()
    processes = [worker(source, options.threads) for source in (options.other.resolve(), HERE)]
    print("| task | other, s | this, s | ratio |\n|---|---|---|---|")
    asked = [task for task in options.tasks if task != "step"]
    lines = [f"{task} {model} {count}" for model in ("san-vit-b16", "tiny") for count in (20, 171) for task in asked]
    for line in [*lines, *(["step san-vit-b16 171"] if "step" in options.tasks else [])]:
        for process in processes:
            seconds(process, line)  # warm-up
        taken = []
        for pair in range(options.pairs):
            order = processes if pair % 2 else processes[::-1]  # each goes first as often as second
            by_process = {process.pid: seconds(process, line) for process in order}
            taken.append([by_process[process.pid] for process in processes])
        other, this = (statistics.median(side) for side in zip(*taken, strict=True))
        ratio = statistics.median(ours / theirs for theirs, ours in taken)
        task, model, count = line.split()
        print(f"| {task}, {model}, {count} words | {other:.4f} | {this:.4f} | {ratio:.2f} |", flush=True)
    for process in processes:
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main()
