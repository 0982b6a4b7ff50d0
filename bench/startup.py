"""How long does a command take that has nothing to wait for? Medians of whole processes, from start to exit.

    python bench/startup.py [--runs 7] [--json FILE]

Importing torch alone is listed because every labelling process pays it, unless the model was exported (here to ONNX).
Words are cached on disk after the first run, which is not counted. Processor seconds are those of all threads of the
process; on a machine that does other work, only they can be compared.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

SCENE = Path(__file__).parents[1] / "src" / "opensan" / "assets" / "scenes" / "playground.png"
WORDS = "night sky,brick,green heart,white heart,orange circle"


def seconds(command: list[str]) -> tuple[float, float]:
    """Seconds from start to exit, and processor seconds."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def commands(folder: Path) -> dict[str, list[str]]:
    small = folder / "small.png"
    Image.open(SCENE).convert("RGB").resize((320, 240)).save(small)
    opensan = str(Path(sys.executable).with_name("opensan"))
    exported = folder / "exported"
    subprocess.run([opensan, "export", "tiny", "--out", str(exported)], check=True, capture_output=True)
    segment = [opensan, "segment", str(small), "--words", WORDS, "--out", str(folder / "out"), "--model"]
    without = f"import opensan; opensan.load({str(exported)!r}).segment({str(small)!r}, {WORDS!r})"
    return {
        "`python -c 'import opensan'`": [sys.executable, "-c", "import opensan"],
        "`opensan --help`": [opensan, "--help"],
        "`python -c 'import torch'`": [sys.executable, "-c", "import torch"],
        "`opensan segment` with `tiny`, 320x240": [*segment, "tiny"],
        "`opensan segment` with `tiny` exported, 320x240": [*segment, str(exported)],
        "`opensan.load(exported).segment(...)`, 320x240": [sys.executable, "-c", without],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        named = commands(Path(folder))
        for command in named.values():
            seconds(command)  # warm-up: files into memory, words into the cache
        rounds = [{name: seconds(command) for name, command in named.items()} for _ in range(options.runs)]
    medians = {
        name: [statistics.median(column) for column in zip(*(one[name] for one in rounds), strict=True)]
        for name in named
    }
    print("| process | seconds | processor seconds |")
    print("|---|---|---|")
    for name, (wall, processor) in medians.items():
        print(f"| {name} | {wall:.2f} | {processor:.2f} |")
    if options.json:
        options.json.write_text(json.dumps({"runs": options.runs, "median_s": medians, "rounds": rounds}, indent=2))


if __name__ == "__main__":
    main()
