"""How fast are exported models, against torch?

    python bench/export.py [--model san-vit-b16] [--rounds 5] [--threads 2] [--clock processor]
                           [--ways "torch exact" "onnx float32" ...] [--json FILE]

All ways take turns in one process, so that a busy machine slows all of them; times are medians, ratios the medians of
the rounds'. Weights are filled by the rule of the recorded goldens, words are seeded random rows, the photograph is a
bundled scene at 640x640. *image* is the image graph, *words* what follows new words (classification and label map), and
*whole* is `segment`. The model is exported once and converted; nothing is kept.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import opensan
from opensan.checkpoints.presets import PRESETS
from opensan.config import EXPORT_NAME
from opensan.export import export, formats
from opensan.parity.golden import golden_model
from opensan.segmenters.base import Segmenter
from opensan.segmenters.exported.manifest import read_folder
from opensan.segmenters.results import to_array
from opensan.segmenters.san import SanSegmenter
from opensan.vocabulary import Vocabulary
from segment import CLOCKS, RandomWords, photograph, turns, vocabulary

TORCH = ("torch exact", "torch fast", "torch fastest")
EXPORTED = (
    "onnx float32", "onnx int8", "openvino float32", "openvino bfloat16", "openvino int8",
)  # fmt: skip
SIZE = (640, 640)
WORDS = (20, 171)


class Rows:
    """`RandomWords` as exported models take them: [R, D] arrays."""

    def __init__(self, words: RandomWords) -> None:
        self._words = words

    def classifier(self, vocabulary: Vocabulary) -> np.ndarray:
        return self._words.classifier(vocabulary).rows.numpy()


def segmenters(options: argparse.Namespace, root: Path) -> dict[str, Segmenter]:
    """Every way, ready to be asked."""
    model = golden_model(PRESETS[options.model].config)
    whole = root / "float32"
    started = time.perf_counter()
    _, found = export(model, whole, text=False)
    print(f"exported in {time.perf_counter() - started:.0f} s, labels alike: {100 * found.agreement:.3f} %", flush=True)
    ways: dict[str, Segmenter] = {}
    for way in options.ways:
        first, second = way.split()
        if first == "torch":
            own = golden_model(PRESETS[options.model].config)  # "fast" changes the weights
            ways[way] = SanSegmenter(own, speed=second, text_cache=False)
        else:
            folder = converted(whole, root / way, first, second)
            ways[way] = opensan.load(folder, threads=options.threads)
            size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
            print(f"{way}: {size:.0f} MiB without text tower", flush=True)
    words = RandomWords(SanSegmenter(model, text_cache=False).encode(photograph(*SIZE)).mask_embeddings)
    for segmenter in ways.values():
        segmenter.text = words if isinstance(segmenter, SanSegmenter) else Rows(words)
    return ways


def converted(whole: Path, folder: Path, format: str, dtype: str) -> Path:
    """The exported model `whole` in another format or dtype."""
    shutil.copytree(whole, folder)
    for path in folder.glob("*.onnx"):
        formats.convert(path, format, dtype)
    _, manifest = read_folder(whole)
    manifest = manifest.model_copy(update={"format": format, "dtype": dtype})
    (folder / EXPORT_NAME).write_text(manifest.model_dump_json())
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="san-vit-b16", choices=("san-vit-b16", "san-vit-l14"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--ways", nargs="+", default=[*TORCH, *EXPORTED], choices=[*TORCH, *EXPORTED])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as root:
        ways = segmenters(options, Path(root))
        image = photograph(*SIZE)
        read = {way: segmenter.prepare(image) for way, segmenter in ways.items()}
        encodings = {way: segmenter.encode(image) for way, segmenter in ways.items()}
        labels = {way: segmenter.segment(image, vocabulary(WORDS[-1])).labels for way, segmenter in ways.items()}
        tasks = {"image": {way: lambda way=way: ways[way].encode_read([read[way]]) for way in ways}}
        for count in WORDS:
            words = vocabulary(count)
            tasks[f"words {count}"] = {
                way: lambda way=way, words=words: ways[way].winners(encodings[way], words) for way in ways
            }
        tasks["whole"] = {way: lambda way=way: ways[way].segment(image, vocabulary(WORDS[-1])) for way in ways}
        measured = {task: turns(actions, options.rounds, options.clock) for task, actions in tasks.items()}
    print(
        f"\n| way | {' | '.join(f'{task}, ms | times as fast' for task in tasks)} | embeddings differ | labels alike |"
    )
    print("|---" * (2 * len(tasks) + 3) + "|")
    first = next(iter(ways))
    truth = to_array(encodings[first].mask_embeddings)
    kept: dict[str, float] = {}
    for way in ways:
        cells = [f"{1000 * found['seconds'][way]:.0f} | {found['ratio'][way]:.2f}" for found in measured.values()]
        difference = np.abs(to_array(encodings[way].mask_embeddings) - truth).max() / np.abs(truth).max()
        kept[way] = float((labels[way] == labels[first]).mean())
        print(f"| {way} | {' | '.join(cells)} | {difference:.1e} | {100 * kept[way]:.2f} % |")
    print(
        f"\n{options.model}, {options.threads} threads, {options.clock} seconds, torch {torch.__version__}, "
        f"{options.rounds} rounds"
    )
    if options.json:
        options.json.write_text(json.dumps({"model": options.model, "times": measured, "labels_alike": kept}, indent=2))


if __name__ == "__main__":
    main()
