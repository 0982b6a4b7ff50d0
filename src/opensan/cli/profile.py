"""`opensan profile`: measure the size and the cost of a model."""

import re
from typing import TYPE_CHECKING, Annotated

import typer

from opensan.cli.options import AsJson, Device
from opensan.cli.terminal import UsageError, note, output_console, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from opensan.evaluation.cost import Profile


def profile(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for segment --model.", show_default=False)],
    size: Annotated[str, typer.Option(metavar="HxW", help="Size of the network image.")] = "640x640",
    words: Annotated[int, typer.Option(min=1, max=1_000_000, help="Number of words.")] = 171,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Report a model's parameters, operations by part, peak memory, and images a second.

    Operations are counted from what runs. san-vit-b16 and san-vit-l14 are built with random weights, which cost the
    same, and compared with what the paper and the official code state.
    """
    given = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", size)
    if not given:
        raise UsageError(f"--size {size}: height x width in pixels, like 640x640")
    from opensan.evaluation.cost import profile as make_profile

    note(f"profiling {model}")
    result = make_profile(model, size=(int(given[1]), int(given[2])), words=words, device=device)
    if as_json:
        print_json(result.to_dict())
        return
    console = output_console()
    console.print(_parameters(result))
    console.print(_operations(result))
    for line in [*_comparison(result), *_speed(result)]:
        console.print(line, soft_wrap=True)


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _parameters(result: "Profile") -> "Table":
    table = _table(f"{result.model}: parameters", "part", "all", "trained")
    for part, counts in result.parameters.items():
        table.add_row(part, f"{counts.total:,}", f"{counts.trained:,}")
    return table


def _operations(result: "Profile") -> "Table":
    height, width = result.size
    title = f"one image of {height}x{width}, {result.words} words"
    table = _table(title, "part", "multiply-adds, G", "FLOPs (2x), G")
    total = result.multiply_adds_without_label_map
    for part, count in result.multiply_adds.items():
        if count == 0:
            continue
        if part == "label map":
            table.add_row("all but the label map", _giga(total), _giga(2 * total))
            part = "label map (random masks)"
        table.add_row(part, _giga(count), _giga(2 * count))
    return table


def _giga(count: int) -> str:
    return f"{count / 1e9:,.2f}"


def _comparison(result: "Profile") -> list[str]:
    """Compare a preset at the official size with the published figures."""
    from opensan.evaluation.cost import OFFICIAL_SIZE, official_figures

    official = official_figures(result.model)
    if official is None:
        return []
    trained = result.parameters["all"].trained
    lines = [f"trained parameters: {trained:,}, the official code {official['trained']:,}"]
    if "paper_trained" in official:
        lines[0] += f", the paper {official['paper_trained'] / 1e6:.1f} M"
    if result.size == OFFICIAL_SIZE:
        ours, code = result.multiply_adds_without_label_map, official["code"]
        paper = f"the paper states {official['paper'] / 1e9:.1f}, " if "paper" in official else ""
        lines.append(
            f"multiply-adds without the label map: {_giga(ours)} G; {paper}the official code takes {code / 1e9:.1f}. "
            f"Ours are {1 - ours / code:.0%} fewer for the same answers: the attention head's last layer is folded "
            "into the queries, SLS tokens share one set of patches, and the last CLIP layer is computed for them only"
        )
    return lines


def _speed(result: "Profile") -> list[str]:
    speed = result.speed
    where = speed.device if speed.device != "cpu" else f"cpu, {speed.threads} threads"
    return [
        f"{speed.images_per_second:.2f} images a second, one at a time ({where}; median of {len(speed.seconds)})",
        f"peak memory {speed.peak_memory_mib:,.0f} MiB ({'of the process' if speed.device == 'cpu' else 'of the GPU'})",
    ]
