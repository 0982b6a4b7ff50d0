"""How long does a command take that has nothing to wait for? Medians of whole processes, from start to exit.

    python bench/startup.py [--runs 7] [--models tiny photo] [--exported FOLDER ...] [--python PYTHON]
                            [--before FOLDER] [--only PART ...] [--json FILE]

Importing torch alone is listed because every labelling process pays it, unless the model was exported (to ONNX: the
`--models` are exported first, or their folders are given). An exported model is labelled in a process that fails if
it imported torch. `--python` is an interpreter without torch, with numpy, onnxruntime and the other packages of the
exported folder's requirements.txt; rows that need torch or the command `opensan` are then left out. `--before` is the
source folder of another version, whose processes take turns with this one's; `--only` keeps rows whose names have one
of these parts.

Words are cached on disk, and modules compiled, by a first run, which is not counted. Processor seconds are those of
all threads of the process; on a machine that does other work, only they can be compared.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

SOURCE = Path(__file__).parents[1] / "src"
SCENE = SOURCE / "opensan" / "assets" / "scenes" / "playground.png"
WORDS = "night sky,brick,green heart,white heart,orange circle"

SEGMENT = """
import sys, warnings
warnings.simplefilter("ignore")
import opensan
opensan.load(sys.argv[1]{options}).segment(sys.argv[2], sys.argv[3]).labels
assert "torch" not in sys.modules
"""


def seconds(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds from start to exit, and processor seconds."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def commands(folder: Path, models: list[str], exported: list[Path], python: str | None) -> dict[str, list[str]]:
    """The commands by the names of their rows."""
    small = folder / "small.png"
    Image.open(SCENE).convert("RGB").resize((320, 240)).save(small)
    opensan = [sys.executable, "-m", "opensan"]
    segment = [*opensan, "segment", str(small), "--words", WORDS, "--out", str(folder / "out"), "--model"]
    folders = {path.name: path for path in exported}
    for model in models:
        if not exported:
            folders[model] = folder / model
            export = [*opensan, "export", model, "--out", str(folders[model])]
            environment = os.environ | {"PYTHONPATH": str(SOURCE)}
            subprocess.run(export, check=True, capture_output=True, env=environment)
    named = {"`python -c 'import opensan'`": [python or sys.executable, "-c", "import opensan"]}
    for name, path in folders.items():
        for option, threads in (("", "the runtime's choice of threads"), (", threads=1", "1 thread")):
            code = SEGMENT.format(options=option)
            row = f"`{name}` exported, `opensan.load(...).segment(...)`, 480x640, {threads}"
            named[row] = [python or sys.executable, "-c", code, str(path), str(SCENE), WORDS]
        if python is None:
            named[f"`{name}` exported, `opensan segment`, 320x240"] = [*segment, str(path)]
    if python is None:
        named["`opensan --help`"] = [*opensan, "--help"]
    if python is None and find_spec("torch"):
        named["`python -c 'import torch'`"] = [sys.executable, "-c", "import torch"]
        named |= {f"`{model}`, `opensan segment`, 320x240": [*segment, model] for model in models}
    return named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--models", nargs="+", default=["tiny", "photo"])
    parser.add_argument("--exported", nargs="+", type=Path, default=[])
    parser.add_argument("--python")
    parser.add_argument("--before", type=Path)
    parser.add_argument("--only", nargs="+", default=[""])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sources = {"now": SOURCE} | ({"before": options.before} if options.before else {})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # Modules are compiled, as those of installed packages are, in a folder that both versions share.
        compiled = {"PYTHONPYCACHEPREFIX": str(folder / "compiled"), "PYTHONDONTWRITEBYTECODE": ""}
        environments = {
            name: os.environ | compiled | {"PYTHONPATH": str(source), "OPENSAN_CACHE": str(folder / f"cache-{name}")}
            for name, source in sources.items()
        }
        named = commands(folder, options.models, options.exported, options.python)
        named = {name: command for name, command in named.items() if any(part in name for part in options.only)}
        ways = [(name, version) for name in named for version in sources]
        for name, version in ways:
            seconds(named[name], environments[version])  # warm-up
        rounds = [{way: seconds(named[way[0]], environments[way[1]]) for way in ways} for _ in range(options.runs)]
    rows = []
    print("| process | version | seconds | processor seconds | least |")
    print("|---|---|---|---|---|")
    for name, version in ways:
        wall, processor = zip(*(taken[name, version] for taken in rounds), strict=True)
        row = {"wall": statistics.median(wall), "processor": statistics.median(processor), "least": min(processor)}
        rows.append({"process": name, "version": version, **row})
        print(f"| {name} | {version} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |")
    print(f"\nMedians of {options.runs} processes by turns; least: of the processor seconds.")
    if options.json:
        options.json.write_text(json.dumps({"runs": options.runs, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
