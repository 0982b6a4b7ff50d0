"""How much memory does a whole process take that loads a checkpoint and labels a photograph?

    python bench/memory.py [--models san-vit-b16 san-vit-l14] [--speeds exact fast fastest] [--words 171] [--json FILE]

Each row is a process of its own: `import torch`, `opensan.load` of a checkpoint in float32 (weights by the rule of the
recorded goldens), and `segment` of a bundled scene at 640x640. Figures are the highest resident memory until then, of
the process with the pages of the file that it reads, in GiB. The first row of a speed embeds its words by the text
tower; the second has them in the cache. *answer* is a checksum of proposals and text rows: whatever memory a speed
takes, it stays the same.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

from segment import photograph, resident_gib, vocabulary


def one(folder: str, speed: str, words: int) -> None:
    """Label a photograph in this process, and print the memory that it took."""
    warnings.simplefilter("ignore")
    taken = {"torch": resident_gib("VmHWM")}

    import opensan
    from opensan.assemble.bands import to_array

    segmenter = opensan.load(folder, speed=speed)
    taken["load"] = resident_gib("VmHWM")
    found = segmenter.segment(photograph(640, 640), vocabulary(words))
    taken["segment"] = resident_gib("VmHWM")
    arrays = [*found.encoding.arrays.values(), segmenter.text.classifier(found.vocabulary).rows]
    checksum = zlib.crc32(b"".join(to_array(array).tobytes() for array in arrays))
    print(json.dumps({**taken, "answer": f"{checksum:08x}"}))


def measure(folder: Path, model: str, speed: str, words: int) -> list[dict[str, object]]:
    """A row with new words, and one with the same words from the cache."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for text in ("new words", "words in the cache"):
            command = [sys.executable, __file__, "--one", str(folder), "--speeds", speed, "--words", str(words)]
            environment = {**os.environ, "OPENSAN_CACHE": cache}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            rows.append({"model": model, "speed": speed, "text": text, **json.loads(done.stdout)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["san-vit-b16", "san-vit-l14"])
    parser.add_argument("--speeds", nargs="+", default=["exact", "fast", "fastest"])
    parser.add_argument("--words", type=int, default=171)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one, options.speeds[0], options.words)
        return

    from opensan.checkpoints import save_folder
    from opensan.checkpoints.presets import PRESETS
    from opensan.parity.golden import golden_model

    rows = []
    print("| model | speed | text | after `import torch` | after `load` | after `segment` | answer |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            save_folder(golden_model(PRESETS[model].config), folder)
            for speed in options.speeds:
                for row in measure(Path(folder), model, speed, options.words):
                    rows.append(row)
                    cells = " | ".join(f"{row[part]:.2f}" for part in ("torch", "load", "segment"))
                    print(f"| {model} | {speed} | {row['text']} | {cells} | {row['answer']} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
