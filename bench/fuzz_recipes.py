"""Does any YAML, or any override, end in anything but a configuration or one line that names the file and the key?

    python bench/fuzz_recipes.py [--count 2000] [--seed 0] [--show]

Half of the inputs are recipe files, half are overrides. Each begins as a right one; then values, keys, tags, structure
or bytes are replaced. What is read must also be printed as YAML and read back as the same configuration.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

from opensan.config import dotted_keys
from opensan.errors import UserError
from opensan.recipe.config import RecipeConfig, override, read_recipe
from opensan.recipe.show import to_yaml

RECIPE = """start: {model: tiny, weights: model}
data:
  - {folder: set}
validation: {folder: set, split: val, limit: 2, pictures: 1}
loop: {steps: 24, batch_size: 2, learning_rate: 0.001, save_every: 2, keep: 2, log_every: 1, validate_every: 4}
augment: {short_sides: [96, 128], crop: [96, 96]}
points: {count: 64}
device: cpu
out: run
"""
KEYS = [*dotted_keys(RecipeConfig), "data.0.folder", "data.1.weight", "augment.crop.1", "data.0", "data.9", "nothing"]
TAGS = ["bool", "int", "float", "null", "timestamp", "binary", "set", "omap", "pairs", "map", "seq", "str", "merge"]
TAGS = [f"!!{tag}" for tag in TAGS] + ["!own", "!!python/name:os.system", "!!python/object/apply:os.system", "!<x>"]
VALUES = [
    *("", "0", "-1", "1", "1e400", ".nan", "-.inf", "null", "~", "yes", "maybe", "2024-13-45", "2024-01-02", "1:30:99"),
    *("0x" + 5000 * "f", 5000 * "7", "0b1", "[]", "{}", "[1, 2", "{a: 1", "{a: 1, a: 2}", "'", '"\\ud800"', '"\\0"'),
    *(3000 * "[", 1000 * "{a: ", "&a [*a]", "*b", "&a {x: *a}", "<<: 3", "? [1]", "- - - 1", "|\n  a\n  b", ">", "%A"),
    *(
        "@",
        "`",
        "\u2028",
        "\ufeff",
        "é" * 300,
        "a\tb",
        "!",
        "!!",
        "a: b: c",
        "# nothing",
        "--- 1",
        "...",
        "1_000",
        "010",
    ),
]


def value(generator: random.Random) -> str:
    tag = generator.choice(TAGS) + " " if generator.random() < 0.4 else ""
    return tag + generator.choice(VALUES)


def recipe(generator: random.Random) -> bytes:
    """A recipe with one to three things wrong."""
    text = RECIPE
    for _ in range(generator.randint(1, 3)):
        lines = text.splitlines()
        number = generator.randrange(len(lines))
        key, colon, rest = lines[number].partition(":")
        kind = generator.randrange(6)
        if kind == 0:
            lines[number] = f"{key}{colon} {value(generator)}"
        elif kind == 1:
            lines[number] = f"{value(generator)}{colon}{rest}"
        elif kind == 2:
            parts = rest.split(",")
            part = generator.randrange(len(parts))
            parts[part] = f"{parts[part].partition(':')[0]}: {value(generator)}"
            lines[number] = f"{key}{colon}{','.join(parts)}"
        elif kind == 3:
            lines.insert(number, generator.choice(lines))
        elif kind == 4:
            del lines[number]
        else:
            lines.insert(number, generator.choice(KEYS) + ": " + value(generator))
        text = "\n".join(lines) + "\n"
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    if generator.random() < 0.3:
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
    return bytes(data)


def overrides(generator: random.Random) -> list[str]:
    """One to three overrides, most of them wrong."""
    made = []
    for _ in range(generator.randint(1, 3)):
        key = generator.choice(KEYS)
        if generator.random() < 0.2:
            key = generator.choice(
                [key + 1500 * ".a", f"{key}.-1", f"{key}.²", f"{key}..a", "", f"{key}.{9 * '9'}9", "="]
            )
        made.append(f"{key}{generator.choice(['=', '=', '=', '=', ''])}{value(generator)}")
    return made


def tried(read) -> str:
    """ "read" or "refused"; raises on anything else."""
    started = time.monotonic()
    try:
        config = read()
    except UserError as error:
        message = str(error)
        assert len(message.splitlines()) == 1 and len(message) < 600, message
        assert ":" in message, message  # the file or the override stands before it
        outcome = "refused"
    else:
        again = override(config, [])
        assert again == config
        to_yaml(config)
        outcome = "read"
    assert time.monotonic() - started < 10
    return outcome


def fuzz(count: int, seed: int, show: bool = False) -> Counter[str]:
    """Try `count` inputs; returns how many were read, refused, or (the first line of) anything else."""
    generator = random.Random(seed)
    outcomes: Counter[str] = Counter()
    right = read_recipe_text(RECIPE.encode())
    for number in range(count):
        given = recipe(generator) if number % 2 else overrides(generator)
        try:
            if isinstance(given, bytes):
                outcomes[tried(lambda given=given: read_recipe_text(given))] += 1
            else:
                outcomes[tried(lambda given=given: override(right, given))] += 1
        except Exception as error:
            outcomes[f"{type(error).__name__}: {str(error)[:100]}"] += 1
            if show:
                print(repr(given)[:600])
    return outcomes


def read_recipe_text(data: bytes) -> RecipeConfig:
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        Path(file.name).write_bytes(data)
        return read_recipe(file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print what ends in anything else")
    arguments = parser.parse_args()
    outcomes = fuzz(arguments.count, arguments.seed, arguments.show)
    for outcome, count in outcomes.most_common():
        print(f"{count:6} {outcome}")
    raise SystemExit(set(outcomes) - {"read", "refused"} != set())


if __name__ == "__main__":
    main()
