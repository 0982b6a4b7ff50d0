"""Does any image, list of words or model file end in anything but an answer or one line that says what is wrong?

    python bench/fuzz.py images [--count 10000] [--seed 0]
    python bench/fuzz.py words [--count 5000]
    python bench/fuzz.py models [--count 1000]

Each input begins as a right one, of which bytes, numbers or structure are then changed. Inputs are tried in a process
of their own, so that crashes and hangs are counted too. Everything follows from the seed and the input's number:
`--first N --count 1 --show` tries one again.
"""

import argparse
import io
import json
import multiprocessing
import random
import struct
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from opensan.errors import UserError

HANG_SECONDS = 10
START_SECONDS = 600
"""For a process to import torch and make the right inputs, on a busy machine."""

Try = Callable[[random.Random], None]


# ----------------------------------------------------------------------------------------------------------- mutations


def mutated(data: bytes, generator: random.Random, *, head: int = 256) -> bytes:
    """Change bytes, mostly at the beginning, where formats keep their sizes; cut, repeat or drop a part."""
    changed = bytearray(data)
    for _ in range(generator.choice([1, 1, 2, 4, 16])):
        size = len(changed)
        if size < 8:
            break
        at = generator.randrange(min(head, size) if generator.random() < 0.6 else size)
        kind = generator.randrange(8)
        if kind == 0:
            changed[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            changed[at] = generator.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif kind == 2:
            number = generator.choice([0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, generator.randrange(2**32)])
            changed[at : at + 4] = struct.pack(generator.choice("<>") + "I", number)
        elif kind == 3:
            del changed[at : at + generator.randint(1, 64)]
        elif kind == 4:
            changed[at:at] = changed[at : at + generator.randint(1, 64)]
        elif kind == 5:
            changed[at:at] = generator.randbytes(generator.randint(1, 16))
        elif kind == 6:
            del changed[max(8, at) :]
        else:
            other = generator.randrange(size)
            changed[at : at + 16] = changed[other : other + 16]
    return bytes(changed)


# -------------------------------------------------------------------------------------------------------------- images


def images() -> Try:
    """Return a function that reads a mutated image in one of 40 forms."""
    from PIL import Image

    from opensan.images import image_size, open_image

    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 4), dtype=np.uint8)
    colour, grey = Image.fromarray(noise[..., :3]), Image.fromarray(noise[..., 0])
    modes = {
        "RGB": colour, "L": grey, "RGBA": Image.fromarray(noise), "1": grey.convert("1"), "P": colour.quantize(16),
        "I;16": Image.fromarray(noise[..., 0].astype(np.uint16) * 257), "CMYK": colour.convert("CMYK"),
        "LA": Image.fromarray(noise).convert("LA"), "F": grey.convert("F"), "I": grey.convert("I"),
    }  # fmt: skip
    forms = ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "MPO"]
    exif = Image.Exif()
    exif[0x0112] = 6
    originals = []
    for name in forms:
        for image in modes.values():
            for options in ({}, {"exif": exif}, {"compression": "tiff_lzw"}, {"progressive": True}):
                try:
                    file = io.BytesIO()
                    image.save(file, name, **options)
                    originals.append(file.getvalue())
                except Exception:  # a form that can't hold this
                    continue
    originals = list(dict.fromkeys(originals))

    def attempt(generator: random.Random) -> None:
        data = mutated(generator.choice(originals), generator)
        pixels = open_image(data, max_pixels=10_000_000)
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        assert image_size(data) == pixels.shape[:2]

    return attempt


# --------------------------------------------------------------------------------------------------------------- words

LISTS = [
    "road, car|automobile, sky", '["night sky", "brick"]', "['road', 'car']", '{"words": ["a"], "background": ["x"]}',
    "道路、车，天空", "a; b; c", "road\ncar\nsky", '"road, route", car', "می‌خواهم، سيارة", "# note\nroad\ncar # x\n",
    '[{"name": "car", "synonyms": ["taxi"], "prompts": ["a {}"], "background": false}]', "- road\n- car\n",
    "names:\n  0: road\n  1: car\n", "words: [road, car]\nbackground: [sky]\ntemplates: single\n", "",
]  # fmt: skip
PIECES = [
    ",", "|", ";", "\n", "\t", " ", "  ", "\0", "\x1b[2J", "\u200b", "\ufeff", "\u2028", "\ud800", "\u202e", "é",
    "e\u0301", "😀", "𝒳", "ﬁ", "İ", "[", "]", "{", "}", "(", "'", '"', "“", "｜", "#", "\\", "&amp;", "&#0;", "%",
    "<start_of_text>", "0: ", "car.txt", "C:\\x", "a" * 3000, "字" * 500, "- ", "!!python/name:os.system", "*a", "&a ",
    "null", "NaN", "1e999",
]  # fmt: skip


def words() -> Try:
    """Return a function that reads a mutated list, as text, Python data or a file, and embeds what it holds."""
    from opensan.segmenters.san import load_san
    from opensan.vocabulary import Vocabulary

    text = load_san("tiny", text_cache=False).text
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name)

    def listed(generator: random.Random) -> str:
        made = generator.choice(LISTS)
        for _ in range(generator.choice([0, 1, 1, 2, 5, 20])):
            at = generator.randint(0, len(made))
            if generator.random() < 0.2:
                made = made[:at] + made[at + generator.randint(1, 5) :]
            else:
                made = made[:at] + generator.choice(PIECES) + made[at:]
        return made * 2 if generator.random() < 0.03 else made

    def plain(generator: random.Random, depth: int = 0) -> object:
        kind = generator.randrange(9 if depth < 3 else 5)
        if kind < 4:
            return listed(generator)[:40]
        if kind == 4:
            return generator.choice([None, True, 3, -1, float("nan"), b"road", object(), (), [], {}])
        if kind < 7:
            return [plain(generator, depth + 1) for _ in range(generator.randint(0, 4))]
        keys = ["name", "text", "synonyms", "prompts", "background", "words", "names", "templates", "x", 3]
        return {generator.choice(keys): plain(generator, depth + 1) for _ in range(generator.randint(0, 4))}

    def attempt(generator: random.Random) -> None:
        kind = generator.randrange(4)
        background = listed(generator) if generator.random() < 0.2 else ()
        if kind == 0:
            vocabulary = Vocabulary.parse(plain(generator), background=background)
        elif kind == 1:
            file = path / ("words" + generator.choice([".txt", ".json", ".yaml", ".csv", ""]))
            data = listed(generator).encode(generator.choice(["utf-8", "utf-16", "latin-1", "utf-8"]), "replace")
            file.write_bytes(mutated(data, generator) if generator.random() < 0.5 else data)
            vocabulary = Vocabulary.from_file(file, background=background)
        else:
            vocabulary = Vocabulary.parse(listed(generator), background=background)
        assert Vocabulary.parse(json.loads(json.dumps(vocabulary.to_dict(), allow_nan=False))) == vocabulary
        rows = text.classifier(vocabulary).rows.numpy()
        assert rows.shape == (len(vocabulary.row_class), rows.shape[1]) and np.isfinite(rows).all(), "not finite"

    attempt.folder = folder  # type: ignore[attr-defined]  # kept as long as the function
    return attempt


# -------------------------------------------------------------------------------------------------------------- models


def models() -> Try:
    """Return a function that loads a small model of which a file was mutated, and labels an image with it."""
    import shutil

    import torch

    import opensan
    from opensan.checkpoints import save_folder
    from opensan.checkpoints.official import to_official
    from opensan.checkpoints.pickles import load_official
    from opensan.config import ClipConfig, ImageConfig, ModelConfig, SideAdapterConfig, TextConfig, VisionConfig
    from opensan.export import export
    from opensan.model import build_san
    from opensan.segmenters.san import SanSegmenter
    from opensan.vocabulary import Vocabulary

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = ModelConfig(
        name="small",
        clip=ClipConfig(
            embed_dim=24, quick_gelu=True,
            vision=VisionConfig(width=32, layers=5, heads=4, patch_size=8, image_size=64),
            text=TextConfig(width=16, layers=2, heads=2),
        ),
        side_adapter=SideAdapterConfig(
            width=48, depth=4, heads=3, image_size=96, queries=10, fusion={0: 0, 1: 1, 2: 3},
            supervised_blocks=(3, 4), mask_channels=20, mlp_channels=28,
        ),
        recognition_layer=3, clip_scale=0.5, image=ImageConfig(short_side=96, long_side=384),
    )  # fmt: skip
    model = build_san(config)
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name)
    save_folder(model, path / "native")
    torch.save({"model": to_official(model.state_dict(), config)}, path / "official.pth")
    export(model, path / "exported", words=Vocabulary.parse("road, sky"))
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)

    def changed(source: Path, generator: random.Random) -> None:
        data = source.read_bytes()
        if source.suffix == ".json" and generator.random() < 0.6:
            source.write_text(json.dumps(_other_values(json.loads(data), generator)))
        elif generator.random() < 0.3:  # weights that are read, but make no sense
            numbers = bytearray(data)
            for _ in range(generator.choice([1, 10, 1000])):
                at = generator.randrange(len(numbers) // 2, len(numbers) - 4)
                wild = generator.choice([float("nan"), float("inf"), 3e38, -1e30, 1e-40, 0.0])
                numbers[at : at + 4] = struct.pack("<f", wild)
            source.write_bytes(numbers)
        else:
            source.write_bytes(mutated(data, generator, head=4096))

    def attempt(generator: random.Random) -> None:
        kind = generator.choice(["native", "native", "official", "exported", "exported"])
        with tempfile.TemporaryDirectory(dir=path) as place:
            if kind == "official":
                file = Path(shutil.copy(path / "official.pth", place))
                changed(file, generator)
                segmenter = SanSegmenter(load_official(file, config), text_cache=False)
            else:
                copy = shutil.copytree(path / kind, Path(place) / "model")
                changed(generator.choice(sorted(file for file in copy.iterdir() if file.is_file())), generator)
                options = {"threads": 1} if kind == "exported" else {}
                segmenter = opensan.load(copy, text_cache=False, **options)
            found = segmenter.segment(picture, "road, sky")
            assert np.isfinite(found.confidence).all(), "not finite"
            assert found.labels.shape == (48, 64)

    attempt.folder = folder  # type: ignore[attr-defined]  # kept as long as the function
    return attempt


def _other_values(data: object, generator: random.Random) -> object:
    """Replace a value or a key somewhere in JSON data."""
    values = [None, True, 0, -1, 1, 3, 1e-300, 1e300, 2**40, "x", "", [], {}, [0], {"0": 9}, float("nan"), float("inf")]
    if isinstance(data, dict) and data and generator.random() < 0.9:
        key = generator.choice(sorted(data))
        if generator.random() < 0.1:
            return {(k if k != key else "other"): v for k, v in data.items()}
        return data | {key: _other_values(data[key], generator)}
    if isinstance(data, list) and data and generator.random() < 0.8:
        at = generator.randrange(len(data))
        return [*data[:at], _other_values(data[at], generator), *data[at + 1 :]]
    return generator.choice(values)


# ------------------------------------------------------------------------------------------------------------- running


KINDS: dict[str, Callable[[], Try]] = {"images": images, "words": words, "models": models}
COUNTS = {"images": 10_000, "words": 5_000, "models": 1_000}


def outcome(attempt: Try, kind: str, seed: int, number: int) -> tuple[str, str]:
    """Return how an input ended, and what there is to show of it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attempt(random.Random(f"{kind} {seed} {number}"))
    except UserError as error:
        message = str(error)
        return ("refused", message) if len(message.splitlines()) == 1 and len(message) < 1000 else ("long", message)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}", traceback.format_exc()
    return "answered", ""


def _work(kind: str, seed: int, numbers: range, out: Connection) -> None:
    attempt = KINDS[kind]()
    out.send((-1, "ready", ""))
    for number in numbers:
        out.send((number, *outcome(attempt, kind, seed, number)))
    out.close()


def fuzz(kind: str, count: int, seed: int = 0, first: int = 0, show: bool = False) -> Counter[str]:
    """Try `count` inputs of a kind; returns how many were answered, refused, or ended otherwise."""
    outcomes: Counter[str] = Counter()
    context = multiprocessing.get_context("spawn")
    number, end, slowest = first, first + count, 0.0
    while number < end:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(kind, seed, range(number, end), send), daemon=True)
        process.start()
        send.close()
        waiting = START_SECONDS
        while number < end:
            began = time.monotonic()
            try:
                if not receive.poll(waiting):
                    outcomes["hung"] += 1
                    print(f"{number}: hung", flush=True)
                    number += 1
                    break
                done, how, what = receive.recv()
            except EOFError:
                process.join()
                outcomes[f"crashed with {process.exitcode}"] += 1
                print(f"{number}: crashed with {process.exitcode}", flush=True)
                number += 1
                break
            if done >= 0:
                slowest = max(slowest, time.monotonic() - began)
                outcomes[how] += 1
                if show or how not in ("answered", "refused"):
                    print(f"{done}: {how}\n{what}", flush=True)
                number = done + 1
            waiting = HANG_SECONDS
        process.kill()
        process.join()
    print(f"slowest {slowest:.1f} s")
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--show", action="store_true", help="print how each input ended")
    given = parser.parse_args()
    outcomes = fuzz(given.kind, given.count or COUNTS[given.kind], given.seed, given.first, given.show)
    for how, count in outcomes.most_common():
        print(f"{count:6} {how}")
    raise SystemExit(not set(outcomes) <= {"answered", "refused"})


if __name__ == "__main__":
    main()
