"""How long does a command take that has nothing to wait for? Medians of whole processes, from start to exit.

    python bench/startup.py [--runs 7] [--json FILE]

Importing torch alone is listed because every labelling process pays it. The words of the last row are cached on disk
after the first run, which is not counted.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

SCENE = Path(__file__).parents[1] / "src" / "opensan" / "assets" / "scenes" / "playground.png"
WORDS = "night sky,brick,green heart,white heart,orange circle"


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def commands(folder: Path) -> dict[str, list[str]]:
    small = folder / "small.png"
    Image.open(SCENE).convert("RGB").resize((320, 240)).save(small)
    opensan = str(Path(sys.executable).with_name("opensan"))
    segment = [opensan, "segment", str(small), "--model", "tiny", "--words", WORDS, "--out", str(folder / "out")]
    return {
        "`python -c 'import opensan'`": [sys.executable, "-c", "import opensan"],
        "`opensan --help`": [opensan, "--help"],
        "`python -c 'import torch'`": [sys.executable, "-c", "import torch"],
        "`opensan segment` with `tiny`, 320x240": segment,
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
    medians = {name: statistics.median(one[name] for one in rounds) for name in named}
    print("| process | seconds |")
    print("|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} |")
    if options.json:
        options.json.write_text(json.dumps({"runs": options.runs, "median_s": medians, "rounds": rounds}, indent=2))


if __name__ == "__main__":
    main()
