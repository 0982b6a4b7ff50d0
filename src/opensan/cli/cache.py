"""`opensan cache`: show or remove the cached text embeddings."""

from typing import Annotated

import typer

from opensan.errors import UserError


def cache(clear: Annotated[bool, typer.Option("--clear", help="Remove it.")] = False) -> None:
    """Show where embeddings of words are kept between runs, and how much they take.

    They are computed again when they are missing; what was used longest ago goes first when they grow beyond the
    limit. OPENSAN_CACHE names another folder.
    """
    from opensan.text.cache import MAX_BYTES, cache_files, default_folder, remove

    folder = default_folder()
    files = cache_files(folder)
    size = sum(files.values())
    if clear:
        try:
            for path in files:
                remove(path)
        except OSError as error:
            raise UserError(f"{error.filename}: can't be removed ({error.strerror})") from None
        print(f"removed {size / 2**20:,.1f} MiB from {folder}")
    else:
        print(f"{folder}: {size / 2**20:,.1f} MiB, limit {MAX_BYTES / 2**20:,.0f} MiB")
