"""Do an experiment's runs one after the other; a run that is done is in the journal and not done again."""

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opensan.files import hold
from opensan.journal import Journal


def each_run(
    keys: Sequence[str],
    work: Mapping[str, Any],
    out: Path,
    do: Callable[[str, Path], Mapping[str, Any]],
    write: Callable[[list[dict[str, Any]]], list[Path]],
    *,
    say: Callable[[str], None],
) -> list[Path]:
    """Do the runs of `keys` whose results are not in `out`, and write the results after each.

    `work` is all that the results depend on besides the key: with other settings, all runs are done again. `do` takes a
    key and the run's own folder, where a stopped run goes on, and returns plain data. `write` takes the data of all
    runs that are done and returns the files that it wrote; so does this function.
    Raises UserError, one line, if another process works in `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = hold(out / ".lock", f"{out}: another process runs its experiments into this folder")
    with lock, Journal(out / "runs.sqlite") as journal:
        if journal.begin(dict(work)):
            say(f"{out}: the runs there had other settings; all are done again")
            shutil.rmtree(out / "running", ignore_errors=True)
        for key in keys:
            if journal.get(key) is not None:
                continue
            say(key)
            journal.put(key, dict(do(key, out / "running" / re.sub(r"\W+", "-", key))))
            shutil.rmtree(out / "running", ignore_errors=True)
            write([value for _, value in journal.items()])
        return write([value for _, value in journal.items()])
