"""`opensan models`, `convert`, `push` and `parity`: list named models, convert official weights, publish, compare."""

from pathlib import Path
from typing import Annotated

import typer

from opensan.cli.options import AsJson
from opensan.cli.terminal import note, output_console, print_json
from opensan.errors import UserError


def models(as_json: AsJson = False) -> None:
    """List the models that have names, and what was proved of each.

    A name labels images (--model NAME) or starts a training (start.model=NAME in a recipe). The kind says how
    the encoder works.
    """
    from opensan.checkpoints import preset_config
    from opensan.checkpoints.presets import PRESETS

    rows = [
        (name, preset_config(name).clip.kind, "labels", f"trained and tested here, on {pictures}")
        for name, pictures in (("photo", "photographs"), ("tiny", "drawn scenes"))
    ]
    for name, preset in PRESETS.items():
        rows.append((name, preset.config.clip.kind, "labels" if preset.official else "trains", preset.proved))
    if as_json:
        print_json([dict(zip(("name", "kind", "use", "proved"), row, strict=True)) for row in rows])
        return
    console = output_console()
    if console.is_terminal:
        from rich import box
        from rich.table import Table

        table = Table("name", "kind", "use", "proved", box=box.SIMPLE)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    else:
        for name, kind, use, proved in rows:
            print(f"{name:<22} {kind:<12} {use:<7} {proved}")
    for line in (
        "labels: give the name to --model; trains: no SAN around the encoder was released; start a training from it",
        "only photo and tiny were tested with their real weights here; all others are untested with theirs",
    ):
        console.print(line, soft_wrap=True)


def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE.pth", help="An official checkpoint.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
) -> None:
    """Convert official weights to safetensors.

    Writes model.safetensors and config.json to a folder that --model takes. The file is read as weights only:
    nothing that a pickle may ask for is executed.
    """
    for name in ("model.safetensors", "config.json"):
        if (out / name).exists():
            raise UserError(f"{out / name} exists already: choose another folder, or move it away")
    from opensan.outputs import check_writable

    check_writable(out)
    note(f"reading {checkpoint}")
    from opensan.checkpoints import load_official, save_folder

    model = load_official(checkpoint)
    save_folder(model, out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {model.config.name}, {parameters:,} parameters")
    print(f'use it with: opensan segment IMAGE --words "..." --model {out}')


def push(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A folder, such as runs/street/model; or as --model.", show_default=False),
    ],
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub.", show_default=False)
    ],
    private: Annotated[bool, typer.Option("--private", help="If it must be made, make it private.")] = False,
    license: Annotated[
        str | None, typer.Option(metavar="NAME", help="The licence of the weights, such as mit.", show_default=False)
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Results of `opensan eval` for one data set, for the card; repeat it for more.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Upload a model to the Hugging Face hub.

    From then on, every command takes it as --model OWNER/NAME. A model card is written from the record of the training.
    The token is that of HF_TOKEN or `hf auth login`.
    """
    note(f"checking {model}")
    from opensan.checkpoints.push import push as push_model

    pushed = push_model(model, repository, private=private, license=license, evaluations=evaluation or [])
    print(pushed.page)
    print(f'use it with: opensan segment IMAGE --words "..." --model {repository}')
    print(f"or, for good: --model {repository}@{pushed.commit}")


def parity(
    goldens: Annotated[list[Path], typer.Argument(metavar="FILE.npz...", help="Recorded results.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Compare with the official code's results.

    The files hold what the official code computed with weights filled by a rule. Prints the largest difference of
    each tensor; exit code 1 if one is above its limit.
    """
    for path in goldens:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    from opensan.parity.inference import check_golden

    results = {}
    for path in goldens:
        results[str(path)] = rows = check_golden(path)
        if not as_json:
            print(path)
            for row in rows:
                print(f"  {'ok  ' if row.passed else 'FAIL'} {row.name:<42} {row.value:10.2e}  limit {row.limit:.0e}")
    if as_json:
        told = ("name", "value", "limit", "passed")
        print_json({path: [{key: getattr(row, key) for key in told} for row in rows] for path, rows in results.items()})
    if not all(row.passed for rows in results.values() for row in rows):
        raise typer.Exit(1)
