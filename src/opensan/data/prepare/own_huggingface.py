"""Read tables of images and masks, as Hugging Face `datasets` writes them: `opensan data prepare huggingface`.

The files (Parquet, or the Arrow files of `save_to_disk`) are read with pyarrow; no code of a data set ever runs.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opensan.data.class_list import read_class_list
from opensan.data.prepare.own_images import (
    NO_SPLIT,
    background_notes,
    below,
    evaluation_split,
    vocabulary_of,
    without,
)
from opensan.data.prepare.own_labels import VALUE_OPTIONS, Values, class_values, read_map
from opensan.data.prepare.source import Reader, Source, SourceImage
from opensan.errors import HubError, UserError, install, reason
from opensan.vocabulary import Vocabulary, Word

if TYPE_CHECKING:
    import pyarrow

_SHARD = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]+)?$")
_PHOTOGRAPHS = {"image", "images", "img", "photo", "picture", "pixel_values"}
"""Usual names of the column of images."""

_MASK_FORMATS = ("PNG", "TIFF", "BMP", "GIF")


def open_table(
    folder: Path,
    *,
    repo: str = "",
    classes: str = "",
    image: str = "",
    mask: str = "",
    ignored: str = "",
    unlabelled: str = "",
    first: str = "",
    pixels: str = "",
) -> Source:
    """Open Parquet or Arrow files with a column of images and one of masks whose pixels are class numbers."""
    if repo:
        _download(repo, folder)
    files = _table_files(folder)
    schema = _schema(files[0])
    if different := [file for file in files if _schema(file).names != schema.names]:
        raise UserError(
            f"{different[0]}: its columns are not those of {files[0]}; "
            "if these are several configurations, give the folder of one"
        )
    features = _features(schema, files[0])
    image, mask = _columns(schema, files[0], image, mask)
    names, source = _classes(folder, classes, features)
    vocabulary, labels = without(_vocabulary(names, source), ignored, source)
    label_of_value = dict(zip(names, labels, strict=True))
    values = class_values(label_of_value, first=first, unlabelled=unlabelled, pixels=pixels)
    counts: Counter[str] = Counter()
    source_images = []
    for file in files:
        split = _split(file, folder)
        for group, number in _row_numbers(file):
            row = _Row(file, group, number, image, mask, values)
            name = f"{split}_{counts[split]:06d}"
            source_images.append(SourceImage(name=name, splits=(split,), image=row.source_image, labels=row.labels))
            counts[split] += 1
    return Source(
        vocabulary,
        source_images,
        evaluation_split(counts),
        notes=background_notes(vocabulary),
        unlabelled_because="all values are 255 (unlabelled) or of ignored classes",
        judge=values.judge,
        first_is_free=values.first_is_free,
        first_alone=values.first_alone,
    )


def _vocabulary(names: Mapping[int, str | Word], source: str) -> Vocabulary:
    """Return the classes: the words of a list with synonyms, else names as they are."""
    words = [word if isinstance(word, Word) else Word(word) for word in names.values()]
    return vocabulary_of(words, source)


@dataclass(frozen=True)
class _Row:
    """Reads a row of a table."""

    file: Path
    group: int | None
    """The row group of a Parquet file."""
    number: int
    image_column: str
    mask_column: str
    values: Values

    def source_image(self) -> bytes:
        """Return the content of the image file."""
        return self._picture(self.image_column)

    def labels(self) -> np.ndarray:
        name = self._name(self.mask_column)
        pixels = read_map(self._picture(self.mask_column), name, self.source_image(), _MASK_FORMATS)
        return self.values.labels(pixels, name)

    def _picture(self, column: str) -> bytes:
        columns = (self.image_column, self.mask_column)
        table = _table(self.file, self.group, columns, self.file.stat().st_mtime_ns)
        value = table[column][self.number].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            problem = "only a path; write the table with its pictures in it" if value else "nothing"
            raise UserError(f"{self._name(column)}: holds {problem}")
        return content

    def _name(self, column: str) -> str:
        group = "" if self.group is None else f"row group {self.group}, "
        return f"{self.file}: {group}row {self.number}, column {column!r}"


@functools.lru_cache(maxsize=1)
def _table(file: Path, group: int | None, columns: tuple[str, ...], _modified: int) -> "pyarrow.Table":
    """Open a row group of a Parquet file, or a whole Arrow file (mapped, not read). The last one is cached.

    Neighbouring images are in one group, and each is read for its picture, its mask and its picture's size.
    """
    with _naming(file):
        if group is None:
            return _arrow_table(file)
        from pyarrow import parquet

        return parquet.ParquetFile(file).read_row_group(group, columns=list(columns))


def _arrow_table(file: Path) -> "pyarrow.Table":
    import pyarrow

    mapped = pyarrow.memory_map(str(file))
    is_stream = mapped.read(6) != b"ARROW1"
    mapped.seek(0)
    return (pyarrow.ipc.open_stream(mapped) if is_stream else pyarrow.ipc.open_file(mapped)).read_all()


def _row_numbers(file: Path) -> Iterator[tuple[int | None, int]]:
    """Yield (row group, row in it) of every row."""
    with _naming(file):
        if file.suffix == ".arrow":
            yield from ((None, row) for row in range(_arrow_table(file).num_rows))
            return
        from pyarrow import parquet

        metadata = parquet.read_metadata(file)
        for group in range(metadata.num_row_groups):
            yield from ((group, row) for row in range(metadata.row_group(group).num_rows))


def _schema(file: Path) -> "pyarrow.Schema":
    with _naming(file):
        if file.suffix == ".arrow":
            return _arrow_table(file).schema
        from pyarrow import parquet

        return parquet.read_schema(file)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turn pyarrow's errors into UserError, one line that names the file."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{file}: reading tables needs pyarrow: {install('huggingface')}") from None
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not a readable table ({reason(error)})") from None


def _table_files(folder: Path) -> list[Path]:
    tables = sorted(path for suffix in ("parquet", "arrow") for path in folder.rglob(f"*.{suffix}"))
    # `datasets` keeps what it has computed beside what was saved; hidden folders are a download's notes.
    tables = [file for file in tables if not file.name.startswith("cache-") and not _is_hidden(file, folder)]
    if not tables:
        raise UserError(f"{folder}: no .parquet or .arrow files; say repo=OWNER/NAME to download a data set to there")
    return tables


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _split(file: Path, folder: Path) -> str:
    """Return the split in the file's name ("data/train-00000-of-00002.parquet"), or in its folder's."""
    stem = _SHARD.sub("", file.stem)
    if stem != "data" and not stem.isdecimal():
        return stem
    return NO_SPLIT if file.parent == folder else file.parent.name


def _features(schema: "pyarrow.Schema", file: Path) -> Mapping[str, Any]:
    """Return the column types that `datasets` stored; empty if another program wrote the table."""
    try:
        said = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = said.get("info", {}).get("features", {})
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"{file}: the column types that `datasets` stored are damaged") from None
    return features if isinstance(features, dict) else {}


def _columns(schema: "pyarrow.Schema", file: Path, image: str, mask: str) -> tuple[str, str]:
    """Return the columns of the images and of the masks: by option, else by their type and name."""
    for option, column in (("image", image), ("mask", mask)):
        if column and column not in schema.names:
            raise UserError(f"{option}={column}: {file} has no such column; it has {', '.join(schema.names)}")
    pictures = [field.name for field in schema if _holds_pictures(field.type)]
    rest = [column for column in pictures if column not in (image, mask)]
    if not image:
        named = [column for column in rest if column.lower() in _PHOTOGRAPHS]
        image = named[0] if len(named) == 1 else ""
        rest = [column for column in rest if column != image]
    if not mask and image:
        mask = rest[0] if len(rest) == 1 else ""
    if not image or not mask:
        shown = ", ".join(pictures) or "none"
        raise UserError(f"{file}: which columns are meant? Say image=COLUMN mask=COLUMN; columns of pictures: {shown}")
    return image, mask


def _holds_pictures(kind: "pyarrow.DataType") -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return "bytes" in {kind.field(index).name for index in range(kind.num_fields)}
    return types.is_binary(kind) or types.is_large_binary(kind)


def _classes(folder: Path, classes: str, features: Mapping[str, Any]) -> tuple[dict[int, str | Word], str]:
    """Return the classes by pixel value, and their source."""
    labelled = dict(_class_labels(features))
    if classes in labelled:
        return dict(enumerate(labelled[classes])), f"column {classes}"
    names = [classes] if classes else ["id2label.json", "classes.txt"]
    path = next((path for name in names if (path := below(folder, name, "classes")).is_file()), None)
    if path is None:
        columns = f", or a column of class labels: {', '.join(labelled)}" if labelled else ""
        raise UserError(
            f"{folder / names[0]}: no such file; the names of the pixel values must be in "
            f'id2label.json ({{"0": "road", ...}}) or classes.txt, or say classes=FILE{columns}'
        )
    if path.suffix != ".json":
        listed = read_class_list(path)
        return dict(sorted(zip(listed.values, listed.vocabulary.words, strict=True))), str(path)
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable JSON ({reason(error)})") from None
    if isinstance(said, list):
        said = dict(enumerate(said))
    if not isinstance(said, dict) or not all(
        re.fullmatch(r"\d{1,5}", str(number)) and isinstance(name, str) for number, name in said.items()
    ):
        raise UserError(f'{path}: must be pixel values with their names, {{"0": "road", "1": "sky"}}')
    return {int(number): said[number] for number in sorted(said, key=int)}, str(path)


def _class_labels(features: Any, path: str = "") -> Iterator[tuple[str, list[str]]]:
    """Yield (column, names) of the columns of class labels, also of nested ones ("objects.category")."""
    if not isinstance(features, dict):
        return
    if features.get("_type") == "ClassLabel" and isinstance(features.get("names"), list):
        yield path, features["names"]
        return
    for key, value in features.items():
        # A list, {"feature": ..., "_type": "List"}, adds no level to a column's name.
        inner = path if key == "feature" and "_type" in features else f"{path}.{key}".strip(".")
        yield from _class_labels(value, inner)


def _download(repo: str, folder: Path) -> None:
    """Download a data set's tables from the hub into `folder`; existing files are kept."""
    from huggingface_hub import snapshot_download

    patterns = ["*.parquet", "*.arrow", "id2label.json", "classes.txt"]
    try:
        # For data sets made by a script, the hub itself writes tables to a branch.
        for revision in ("main", "refs/convert/parquet"):
            snapshot_download(repo, repo_type="dataset", revision=revision, local_dir=folder, allow_patterns=patterns)
            if any(folder.rglob("*.parquet")) or any(folder.rglob("*.arrow")):
                return
    except Exception as error:  # the transport library and its errors differ between huggingface_hub's releases
        raise HubError(
            f"repo={repo}: the hub did not give it ({reason(error)}); "
            f"download its .parquet files elsewhere, put them into {folder}, and leave repo= out"
        ) from None


READER = Reader(
    name="huggingface",
    description="Hugging Face data set with columns of images and masks (Parquet, or save_to_disk)",
    open=open_table,
    options={
        "repo": "download the data set OWNER/NAME into the folder first",
        "classes": "id2label JSON or a list of classes in the folder, if it is called otherwise, or a column of labels",
        "image": "the column of images",
        "mask": "the column of masks",
        **VALUE_OPTIONS,
    },
    needs="Parquet or Arrow files, and id2label.json or classes.txt",
    obtained="https://huggingface.co/datasets, or your own",
)
