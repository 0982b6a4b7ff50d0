"""Write a source in the canonical layout, in many processes; a killed run can be continued.

Every file is written under a temporary name and renamed. A finished image is recorded in a journal; the next run
finds its files unchanged, or makes them again; labels that somebody has changed are kept as NAME.changed. The manifest
is written last, so it marks a complete folder.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from opensan.config import parse_config
from opensan.data import canonical
from opensan.data.canonical import DatasetManifest, ImageRecord, Request
from opensan.data.objects import FOLDER as OBJECTS
from opensan.data.objects import MOST_OBJECTS
from opensan.data.pool import run_all
from opensan.data.prepare.source import ImageFile, Labelled, Source, SourceImage
from opensan.errors import UserError
from opensan.files import atomic_path, hold, keep_aside, link, remove_temporaries, write_text
from opensan.images import known_suffixes, open_image
from opensan.journal import Journal, difference
from opensan.vocabulary import Vocabulary

JOURNAL = ".prepare.sqlite"
LOCK = ".prepare.lock"
BEFORE = ".prepare.jsonl"
"""Name of the journal in version 0.1.0."""
_IMAGE, _STALE = "image ", "stale "
"""Beginnings of the journal's keys: images that are finished, and those that another request had made."""
_OURS = re.compile(r"\..*\.part.*|\.prepare\..*")
"""Names in a folder that was only just begun."""


@dataclass(frozen=True)
class LeftOut:
    """An image that could not be used."""

    name: str
    reason: str
    value: int | None = None
    """The value in its label file that is not a class, if that is the reason."""


def prepare(
    source: Source,
    name: str,
    out: Path,
    *,
    options: dict[str, str] | None = None,
    splits: Sequence[str] | None = None,
    workers: int = 1,
    progress: Callable[[int], None] = lambda count: None,
    note: Callable[[str], None] = lambda message: None,
) -> DatasetManifest:
    """Write `source` in the canonical layout to the folder `out`, or finish an earlier run's work there.

    What another request made there is made again.

    Args:
        source: a data set that a reader opened.
        name: the reader's name. With `options`, `splits` and the classes they identify what the folder holds.
        out: a new or empty folder, or one that was prepared before.
        splits: only the images of these lists.
        workers: processes.
        progress: called with the number of finished images.
        note: gets messages for the user.

    Returns:
        The manifest; its `left_out` names the images that could not be used.

    Raises:
        UserError: a split that does not exist or that is incomplete, `out` holding something else or not being
            writable, another run there, a worker process that died, labels that can't be right, or no labelled pixel
            in the whole set.
    """
    source_images, refused = _wanted(source, splits)
    request = Request(
        source=name,
        options=options or {},
        splits=None if splits is None else tuple(sorted(set(splits))),
        classes=class_lines(source.vocabulary),
    )
    try:
        _check_ours(out)
        out.mkdir(parents=True, exist_ok=True)
        busy = f"{out}: another run is preparing it; wait for it, or choose another --out"
        with hold(out / LOCK, busy), _journal_of(out) as journal:
            before, stale = _open_folder(out, journal, request, note)
            kept = len(_kept_aside(out))
            records, failed = _prepare_all(source_images, out, len(request.classes), before, journal, workers, progress)
            if kept := len(_kept_aside(out)) - kept:
                note(f"{kept} labels were changed since they were prepared: kept as *.changed")
            left_out = _all_left_out(source, refused, failed, records.values())
            _look_at_whole(source, out, records.values(), failed, left_out)
            _remove_stale(out, [*before.values(), *stale], records)
            manifest = _write_lists(out, request, source, source_images, records, left_out)
            journal.close()
            journal.path.unlink()
            return manifest
    except OSError as error:  # of any file in the folder; those in reading an image and its labels are caught before
        raise UserError(f"{error.filename or out}: {error.strerror or error}") from None


def _prepare_all(
    source_images: Sequence[SourceImage],
    out: Path,
    classes: int,
    before: dict[str, ImageRecord],
    journal: Journal,
    workers: int,
    progress: Callable[[int], None],
) -> tuple[dict[str, ImageRecord], list[LeftOut]]:
    """Make the images' records, added to the journal one by one, and return them with the images left out."""
    tasks = [_Task(source_image, out, classes, before.get(source_image.name)) for source_image in source_images]
    records: dict[str, ImageRecord] = {}
    failed: list[LeftOut] = []
    with closing(run_all(tasks, workers)) as results:
        for result in results:
            if isinstance(result, LeftOut):
                failed.append(result)
            else:
                records[result.name] = result
                if result != before.get(result.name):
                    journal.put(_IMAGE + result.name, result.model_dump(mode="json"))
            progress(1)
    return records, failed


def _look_at_whole(
    source: Source,
    out: Path,
    records: Collection[ImageRecord],
    failed: list[LeftOut],
    left_out: Mapping[str, str],
) -> None:
    """Raise UserError for problems of the set as a whole; its folder stays unfinished."""
    values = Counter(item.value for item in failed if item.value is not None)
    if values and (problem := source.judge(values)):
        raise UserError(f"{out}: not finished: {problem}")
    if records and not any(record.classes for record in records):
        because = source.unlabelled_because or "all classes may be ignored, or all values be called unlabelled"
        if left_out:  # more likely the cause
            because = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
        raise UserError(f"{out}: not finished: no pixel of {len(records):,} images is labelled: {because}")
    if source.first_alone:
        labelled = sum(pixels for record in records for _, pixels in record.classes or ())
        used = {label for record in records for label, _ in record.classes or ()}
        if used == {0} and labelled < sum(record.width * record.height for record in records):
            raise UserError(f"{out}: not finished: {source.first_alone}")


def _all_left_out(
    source: Source, refused: dict[str, str], failed: Iterable[LeftOut], records: Iterable[ImageRecord]
) -> dict[str, str]:
    """Return all that was left out: name of an image, file or record -> reason."""
    left_out = {**source.left_out, **refused, **{item.name: item.reason for item in failed}}
    for record in records:
        if record.left_out:
            left_out[f"{record.name} (in part)"] = "; ".join(record.left_out)
    return {shown(name): shown(reason) for name, reason in sorted(left_out.items())}


def shown(text: str) -> str:
    """Make `text` printable: a file name may hold bytes that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def class_lines(vocabulary: Vocabulary) -> tuple[str, ...]:
    """Return the lines of classes.txt. Raises UserError if the file would not read back as these words.

    White space around names is lost (ADE20K has a "window "); the tokenizer ignores it anyway.
    """
    lines = []
    for word in vocabulary.words:
        texts = [text.strip() for text in word.synonyms]
        line = "|".join(texts)
        odd = re.search(r"(^|\s)#", line) or len(line.splitlines()) != 1 or any("|" in text for text in texts)
        if odd or word.prompts or word.absorbs or texts[0] != word.name.strip():
            raise UserError(f"the class {word.name!r} can't be written as a line of classes.txt")
        lines.append(line)
    return tuple(lines)


def _wanted(source: Source, splits: Sequence[str] | None) -> tuple[list[SourceImage], dict[str, str]]:
    """Return the images of `splits` whose names can be written, and the reasons for the others."""
    source_images = list(source.images)
    known = {split for source_image in source_images for split in source_image.splits}
    _check_complete(source, known, splits)
    for split in known:
        if canonical.check_name(split) == "classes":
            raise UserError("a split can't be called 'classes': classes.txt is the list of classes")
    if unknown := [split for split in splits or () if split not in known]:
        raise UserError(f"there is no split {unknown[0]!r}: choose from {', '.join(sorted(known))}")
    if splits is not None:
        source_images = [source_image for source_image in source_images if set(source_image.splits) & set(splits)]
    if not source_images:
        raise UserError("the source has no images")
    counts = Counter(source_image.name for source_image in source_images)
    refused = {}
    for name, count in counts.items():
        try:
            canonical.check_name(name)
        except UserError as error:
            refused[name] = str(error)
        if count > 1:
            refused[name] = f"{count} images have this name, so labels could be either's; rename all but one"
    return [source_image for source_image in source_images if source_image.name not in refused], refused


def _check_complete(source: Source, known: set[str], splits: Sequence[str] | None) -> None:
    """Raise UserError if a requested split is incomplete."""
    for split, missing in source.incomplete.items():
        if splits is None:
            others = " or ".join(f"--split {other}" for other in sorted(known - set(source.incomplete)))
            remedy = f"; to prepare the rest alone, say {others}" if others else ""
            raise UserError(f"split {split}: {missing}{remedy}")
        if split in splits:
            raise UserError(f"split {split}: {missing}")


def _check_ours(out: Path) -> None:
    """Raise UserError if a folder holds something, but nothing that a run has begun or finished."""
    begun = any((out / name).exists() for name in (JOURNAL, BEFORE, canonical.MANIFEST))
    if not begun and out.exists() and any(not _OURS.fullmatch(path.name) for path in out.iterdir()):
        raise UserError(f"{out}: holds something else; choose a new or empty folder")


def _journal_of(out: Path) -> Journal:
    """Open or begin the folder's journal. Raises UserError if a file of its name is none."""
    journal = Journal(out / JOURNAL)
    if journal.damaged and not (out / canonical.MANIFEST).exists():
        journal.close()
        journal.damaged.replace(journal.path)
        raise UserError(f"{journal.path}: not the journal of an unfinished run; choose another folder")
    if journal.damaged:
        journal.damaged.unlink()  # what is finished is known from files.jsonl
    return journal


def _open_folder(
    out: Path, journal: Journal, request: Request, note: Callable[[str], None]
) -> tuple[dict[str, ImageRecord], list[ImageRecord]]:
    """Make `out` ready to be written.

    Returns what an earlier run of the same request finished there, by name, and what another request did, which is to
    be removed in the end.
    """
    manifest, wanted = canonical.read_manifest(out), request.model_dump(mode="json")
    finished = manifest and manifest.request.model_dump(mode="json")
    rows = [(key, _record(value)) for key, value in journal.items()]
    listed = list(canonical.read_records(out / canonical.FILES)) if (out / canonical.FILES).exists() else []
    noted = [record for key, record in rows if record and key.startswith(_IMAGE)]
    stale = [record for key, record in rows if record and key.startswith(_STALE)]
    if (known := journal.work or finished or wanted) != wanted:
        note(f"{out}: was prepared with {difference(known, wanted)}: it is prepared again")
        for record in (*listed, *noted):
            _keep_changed(out, record)
        stale, noted = [*stale, *listed, *noted], []
    journal.begin(wanted, [(_STALE + item.name, item.model_dump(mode="json"), b"") for item in stale])
    if manifest is not None and finished != wanted:
        lists = [f"{split}.txt" for split in manifest.splits]
        for name in (*lists, canonical.FILES, canonical.MANIFEST):
            (out / name).unlink(missing_ok=True)
        listed = []
    if (out / BEFORE).exists():
        note(f"{out}: was begun by an earlier version: it is prepared again")
        (out / BEFORE).unlink()
    for folder in (out, out / "images", out / "labels"):
        folder.mkdir(exist_ok=True)
        remove_temporaries(folder)
    if (out / OBJECTS).is_dir():
        remove_temporaries(out / OBJECTS)
    return {record.name: record for record in (*listed, *noted)}, stale


def _record(value: object) -> ImageRecord | None:
    """Return the record in a row of the journal; None if it holds none."""
    try:
        return parse_config(ImageRecord, value, JOURNAL)
    except UserError:
        return None


def _kept_aside(out: Path) -> list[Path]:
    return list((out / "labels").glob("*.changed*"))


def _keep_changed(out: Path, record: ImageRecord) -> None:
    """Keep a label file aside that is not as it was written: somebody has corrected it."""
    label = out / "labels" / record.label.file
    if label.is_file() and canonical.file_record(label) != record.label:
        keep_aside(label)


@dataclass(frozen=True)
class _Task:
    """Prepare one image, unless its files are as `before` records them."""

    source_image: SourceImage
    out: Path
    classes: int
    before: ImageRecord | None

    def __call__(self) -> ImageRecord | LeftOut:
        if self.before is not None and _is_complete(self.before) and _is_whole(self.out, self.before):
            return self.before
        try:
            image = self.source_image.image() if callable(self.source_image.image) else self.source_image.image
            pixels = open_image(image)
            read = self.source_image.labels()
            labelled = read if isinstance(read, Labelled) else Labelled(read, ())
            values = _label_values(labelled.labels, pixels.shape[:2], self.classes)
            objects = _object_values(labelled)
        except (UserError, OSError) as error:
            said = " ".join(str(error).split())
            return LeftOut(self.source_image.name, said, getattr(error, "unknown_value", None))
        return self._write(image, values, objects, labelled.left_out)

    def _write(
        self, image: ImageFile, values: np.ndarray, objects: np.ndarray | None, left_out: tuple[str, ...]
    ) -> ImageRecord:
        if self.before is not None:
            _keep_changed(self.out, self.before)
        # Names may hold dots, so that with_suffix would cut them.
        label_file = self.out / "labels" / f"{self.source_image.name}.png"
        with atomic_path(label_file) as temporary:
            Image.fromarray(values).save(temporary)
        objects_file = self.out / OBJECTS / f"{self.source_image.name}.png"
        if objects is not None:
            objects_file.parent.mkdir(exist_ok=True)
            with atomic_path(objects_file) as temporary:
                Image.fromarray(objects).save(temporary)
        image_file = self.out / "images" / f"{self.source_image.name}{_suffix(image)}"
        if isinstance(image, Path):
            link(image, image_file)
        else:
            with atomic_path(image_file) as temporary:
                if isinstance(image, bytes):
                    temporary.write_bytes(image)
                else:
                    Image.fromarray(image).save(temporary)
        return ImageRecord(
            name=self.source_image.name,
            width=values.shape[1],
            height=values.shape[0],
            image=canonical.file_record(image_file),
            label=canonical.file_record(label_file),
            objects=None if objects is None else canonical.file_record(objects_file),
            classes=canonical.class_pixels(values, self.classes),
            left_out=tuple(shown(reason) for reason in left_out),
        )


def _is_complete(record: ImageRecord) -> bool:
    """Return whether no record of the image was left out (it may be corrected now), and its pixels are counted."""
    return record.classes is not None and not record.left_out


def _is_whole(out: Path, record: ImageRecord) -> bool:
    """Return whether the label has the recorded checksum, and the image (perhaps by a link) the recorded size."""
    label, image = out / "labels" / record.label.file, out / "images" / record.image.file
    return (
        label.is_file()
        and image.is_file()
        and image.stat().st_size == record.image.size
        and canonical.file_record(label) == record.label
        and (record.objects is None or _is_file(out / OBJECTS / record.objects.file, record.objects))
    )


def _is_file(path: Path, record: canonical.FileRecord) -> bool:
    return path.is_file() and canonical.file_record(path) == record


def _label_values(labels: np.ndarray, size: tuple[int, int], classes: int) -> np.ndarray:
    """Return the index PNG's values, [H, W] uint8 (255 unlabelled) or uint16 (65535 unlabelled)."""
    if labels.shape != size:
        raise UserError(
            f"its labels are {labels.shape[1]}x{labels.shape[0]} (width x height), its image {size[1]}x{size[0]}"
        )
    if labels.max() >= classes:
        raise UserError(f"its labels hold the value {labels.max()}, there are {classes} classes")
    kind = np.uint8 if classes <= 255 else np.uint16
    return np.where(labels < 0, np.iinfo(kind).max, labels).astype(kind)


def _object_values(labelled: Labelled) -> np.ndarray | None:
    """Return the objects' map, [H, W] uint16, numbered anew without gaps; None if the reader knows no objects."""
    if labelled.objects is None:
        return None
    kept, numbers = np.unique(np.where(labelled.labels < 0, 0, labelled.objects), return_inverse=True)
    if len(kept) > MOST_OBJECTS:
        raise UserError(f"it has {len(kept):,} objects; an image may have {MOST_OBJECTS:,}")
    first = int(kept[0] != 0)  # where every pixel has an object, numbers begin with 1 all the same
    return (numbers.reshape(labelled.labels.shape) + first).astype(np.uint16)


def _suffix(image: ImageFile) -> str:
    if isinstance(image, np.ndarray):
        return ".png"
    if isinstance(image, Path) and image.suffix.lower() in known_suffixes():
        return image.suffix
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as file:
        kind = file.format or "PNG"
        return {"JPEG": ".jpg", "TIFF": ".tif"}.get(kind, f".{kind.lower()}")


def _remove_stale(out: Path, before: Iterable[ImageRecord], records: dict[str, ImageRecord]) -> None:
    """Remove an earlier run's files of images that are gone or can no longer be used."""
    kept = {record.image.file for record in records.values()}
    for record in before:
        if record.image.file not in kept:
            (out / "images" / record.image.file).unlink(missing_ok=True)
        if record.name not in records:
            (out / "labels" / record.label.file).unlink(missing_ok=True)
            (out / OBJECTS / f"{record.name}.png").unlink(missing_ok=True)


def _write_lists(
    out: Path,
    request: Request,
    source: Source,
    source_images: Sequence[SourceImage],
    records: dict[str, ImageRecord],
    left_out: dict[str, str],
) -> DatasetManifest:
    write_text(out / "classes.txt", "\n".join(request.classes) + "\n")
    splits = request.splits or sorted({split for source_image in source_images for split in source_image.splits})
    counts = {}
    for split in splits:
        # With the suffix, a listed name means one file, even if names have dots.
        members = (source_image for source_image in source_images if split in source_image.splits)
        files = [records[member.name].image.file for member in members if member.name in records]
        write_text(out / f"{split}.txt", "".join(f"{file}\n" for file in files))
        counts[split] = len(files)
    canonical.write_records(out / canonical.FILES, [records[name] for name in sorted(records)])
    class_counts = canonical.class_counts(records.values(), len(request.classes))
    notes = list(source.notes)
    if source.first_is_free and class_counts[0].pixels == 0 and any(count.pixels for count in class_counts):
        notes.append(source.first_is_free)
    manifest = DatasetManifest(
        request=request,
        label_set=source.label_set,
        evaluation_split=source.evaluation_split if source.evaluation_split in counts else None,
        splits=counts,
        photographs=len(records),
        files_sha256=canonical.file_record(out / canonical.FILES).sha256,
        left_out=left_out,
        notes=tuple(notes),
        counts=class_counts,
        pixels=sum(record.width * record.height for record in records.values()),
    )
    canonical.write_manifest(out, manifest)
    return manifest
