"""Labelled data sets as shards: tar files of images and labels, from which a bucket feeds many machines.

classes.txt               as in the canonical layout (see `opensan.data.segmentation_folder`)
SPLIT-00000.tar           WebDataset's form: a sample's files stand together, and have one name up to the first dot:
                          KEY.jpg (any format that Pillow reads), KEY.labels.png, KEY.objects.png where objects are
                          known, KEY.json with the image's own name, {"name": ...}
SPLIT-00000.tar.json      where each sample lies in the tar, and its checksum
SPLIT.shards.json         the split's shards, their sizes, and their numbers of samples

A sample is read by its offset, in one piece, without what stands before it. So the order of a training is that of a
folder: it depends on the seed alone, with any number of processes and workers, and a training goes on at any step.
"""

import hashlib
import io
import json
import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from opensan.buckets import BucketPath
from opensan.data.class_list import read_class_list
from opensan.data.objects import FOLDER, read_objects
from opensan.data.segmentation_folder import SegmentationFolder, image_and_labels, label_file, read_classes
from opensan.errors import UserError, reason, short
from opensan.files import atomic_path, hold, json_text, write_text
from opensan.images import ImageError, image_size, known_suffixes, open_image

INDEX = ".shards.json"
"""End of the name of a split's list of shards."""

FORMAT = 1
"""Version of the files of JSON, to be increased when an older package can't read them."""

LABELS = ("labels.png", "label.png", "seg.png", "mask.png")
"""Names of labels behind the key; the first is written."""

OBJECTS, ABOUT = "objects.png", "json"

_LOCK = ".opensan.lock"
_MOST = 1 << 31
"""Bytes of a file in a shard; what claims more is damaged."""


@dataclass(frozen=True, slots=True)
class Part:
    """A file of a sample, counted from the sample's first byte."""

    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample's place in its shard."""

    name: str
    start: int
    size: int
    """Bytes from the first file's header to the end of the last file."""
    crc32: int
    """Checksum of these bytes."""
    image: Part
    labels: Part
    objects: Part | None
    height: int
    width: int

    @classmethod
    def parse(cls, row: Any) -> "Sample":
        """Read what `astuple` returned. Raises ValueError or TypeError for other data."""
        name, start, size, crc32, image, labels, objects, height, width = row
        parts = [Part(*map(int, part)) for part in (image, labels, *([] if objects is None else [objects]))]
        of_objects = None if objects is None else parts[2]
        place = (str(name), int(start), int(size), int(crc32))
        sample = cls(*place, parts[0], parts[1], of_objects, int(height), int(width))
        inside = all(0 <= part.start <= part.start + part.size <= sample.size for part in parts)
        if sample.start < 0 or not 0 < sample.size <= _MOST or not inside:
            raise ValueError("a sample that lies outside its shard")
        return sample


@dataclass(frozen=True)
class Shard:
    """A shard of a split, as the split's list has it."""

    name: str
    """The tar file's."""
    size: int
    """Its bytes."""
    samples: int


class ShardedSet:
    """One split of a data set in shards, on disk or in a bucket (a `SegmentationDataset`)."""

    def __init__(self, root: Path, split: str, *, ignored: Sequence[str] = ()) -> None:
        """Read the lists; images are read on access.

        Args:
            root: the folder, which may be in a bucket.
            split: the name of a list, without ".shards.json".
            ignored: as for `SegmentationFolder`.

        Raises:
            UserError: one line that names the file: a list or shard that is missing, or damaged as its size tells.
        """
        self.root, self.split = root, split
        try:
            self.vocabulary, self._label_of_value = read_classes(root / "classes.txt", ignored)
            self.shards = read_shards(root, split)
            self._samples = [read_index(root / f"{shard.name}.json") for shard in self.shards]
            for shard, samples in zip(self.shards, self._samples, strict=True):
                _check(root / shard.name, shard, samples)
        except OSError as error:
            named = error.filename or root
            raise UserError(f"{named}: can't be read ({reason(error)}); the shards are not whole") from None
        self._ends = list(accumulate(len(samples) for samples in self._samples))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _find(self, index: int) -> tuple[Path, Sample]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self._ends, index)
        before = self._ends[shard - 1] if shard else 0
        return self.root / self.shards[shard].name, self._samples[shard][index - before]

    def name(self, index: int) -> str:
        return self._find(index)[1].name

    def size(self, index: int) -> tuple[int, int]:
        """Return (H, W) of an image."""
        sample = self._find(index)[1]
        return sample.height, sample.width

    def fingerprint(self) -> str:
        """Return a text that changes with the classes or any sample; reads no shard."""
        digest = hashlib.sha256(repr((self.vocabulary, self._label_of_value.tolist())).encode())
        for samples in self._samples:
            digest.update(repr([(sample.name, sample.crc32, sample.size) for sample in samples]).encode())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        path, sample = self._find(index)
        data = _read(path, sample)
        named = f"{path}: {sample.name}"
        try:
            image = open_image(_part(data, sample.image))
        except ImageError as error:
            raise UserError(f"{named}: {str(error).removeprefix('image bytes: ')}") from None
        labels = io.BytesIO(_part(data, sample.labels))
        return image_and_labels(image, labels, f"{named}'s labels", self._label_of_value)

    @property
    def knows_objects(self) -> bool:
        """Whether all samples have maps of objects."""
        return all(sample.objects is not None for samples in self._samples for sample in samples)

    def objects(self, index: int) -> np.ndarray:
        """Return the number of each pixel's object, [H, W] int32, 0 for none; see `opensan.data.objects`."""
        path, sample = self._find(index)
        if sample.objects is None:
            raise UserError(f"{path}: {sample.name} has no map of objects")
        file = io.BytesIO(_part(_read(path, sample), sample.objects))
        return read_objects(Path(f"{path}: {sample.name}'s objects"), (sample.height, sample.width), file)


def _check(path: Path, shard: Shard, samples: Sequence[Sample]) -> None:
    """Raise UserError if a shard is not of the size that its lists tell."""
    size = path.stat().st_size
    if size != shard.size:
        raise UserError(f"{path}: has {size:,} bytes, not {shard.size:,}: it was changed or not copied whole")
    if len(samples) != shard.samples or any(sample.start + sample.size > size for sample in samples):
        raise UserError(f"{path}.json: does not fit the shard: `opensan data shards` makes it anew")


def _read(path: Path, sample: Sample) -> bytes:
    """Return a sample's bytes. Raises UserError if they are damaged, OSError if they can't be read."""
    if isinstance(path, BucketPath):
        data = path.part(sample.start, sample.size)
    else:
        with path.open("rb") as file:
            file.seek(sample.start)
            data = file.read(sample.size)
    if zlib.crc32(data) != sample.crc32:
        raise UserError(f"{path}: damaged at {sample.name} (another checksum): copy it again")
    return data


def _part(data: bytes, part: Part) -> bytes:
    return data[part.start : part.start + part.size]


def is_sharded(root: Path, split: str) -> bool:
    """Return whether a folder holds a split's list of shards. Raises UserError if a bucket can't be reached."""
    try:
        return (root / f"{split}{INDEX}").exists()
    except OSError as error:
        raise UserError(f"{root}: can't be reached ({reason(error)})") from None


def read_shards(root: Path, split: str) -> list[Shard]:
    """Read a split's list of shards. Raises UserError for a damaged one, OSError if it can't be read."""
    path = root / f"{split}{INDEX}"
    rows = _read_json(path, "shards")
    try:
        shards = [Shard(str(row["name"]), int(row["size"]), int(row["samples"])) for row in rows]
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: damaged ({reason(error)})") from None
    if outside := [shard.name for shard in shards if Path(shard.name).name != shard.name or not shard.name]:
        raise UserError(f"{path}: names {short(outside[0])}, which is not in its folder")
    return shards


def read_index(path: Path) -> list[Sample]:
    """Read where a shard's samples lie. Raises UserError for a damaged file, OSError if it can't be read."""
    try:
        return [Sample.parse(row) for row in _read_json(path, "samples")]
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged ({reason(error)}): `opensan data shards` makes it anew") from None


def _read_json(path: Path, key: str) -> list[Any]:
    text = path.read_bytes()
    try:
        data = json.loads(text)
        if data["format"] > FORMAT:
            raise UserError(f"{path}: was written by a newer version of opensan")
        rows = data[key]
        if not isinstance(rows, list):
            raise TypeError(f"{key} is no list")
        return rows
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged ({reason(error)})") from None


def index_shard(path: Path, called: Path | None = None) -> tuple[list[Sample], list[str]]:
    """Find the samples of a tar file, also of another program's; and say, a line each, what was left out.

    `called` is its name in messages, if not its own. Raises UserError, one line, if it is no whole, uncompressed tar
    file.
    """
    samples: list[Sample] = []
    left_out: list[str] = []
    called = called or path
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for key, members in _grouped(tar):
                name = _name_of(file, key, members)
                try:
                    samples.append(_sample_of(file, name, members))
                except UserError as error:
                    said = str(error).removeprefix("image bytes: ")
                    left_out.append(f"{called}: {name} is left out: {said}")
            file.seek(tar.offset)
            if file.read(512).strip(b"\0") or tar.offset + 512 > path.stat().st_size:
                raise UserError(f"{called}: damaged: it ends, or is no tar file, behind {len(samples)} samples")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{called}: not an uncompressed tar file, or damaged ({reason(error)})") from None
    return samples, left_out


def _grouped(tar: tarfile.TarFile) -> Iterator[tuple[str, list[tuple[str, tarfile.TarInfo]]]]:
    """Yield each key with its files, which stand together; a file's end of name comes without the key."""
    key = ""
    members: list[tuple[str, tarfile.TarInfo]] = []
    for member in tar:
        if not member.isfile() or member.sparse is not None:
            continue
        folder, slash, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        if f"{folder}{slash}{stem}" != key and members:
            yield key, members
            members = []
        key = f"{folder}{slash}{stem}"
        members.append((suffix.lower(), member))
    if members:
        yield key, members


def _name_of(file: Any, key: str, members: Sequence[tuple[str, tarfile.TarInfo]]) -> str:
    """Return the image's own name, if a sample tells it, else its key."""
    about = dict(members).get(ABOUT)
    if about is not None and about.size < 1 << 16:
        file.seek(about.offset_data)
        try:
            name = json.loads(file.read(about.size))["name"]
            if isinstance(name, str) and name.isprintable() and 0 < len(name) < 1000:
                return name
        except (ValueError, KeyError, TypeError, RecursionError):  # of another program's
            pass
    return key


def _sample_of(file: Any, name: str, members: Sequence[tuple[str, tarfile.TarInfo]]) -> Sample:
    """Describe a sample. Raises UserError if it lacks an image or labels, or its image can't be read."""
    by_suffix = dict(members)
    labels = next((by_suffix[name] for name in LABELS if name in by_suffix), None)
    images = [member for suffix, member in members if f".{suffix}" in known_suffixes()]
    if labels is None and len(images) == 2:  # street.jpg and street.png
        labels = next((member for suffix, member in members if suffix == "png"), None)
        images = [member for member in images if member is not labels]
    if labels is None or len(images) != 1:
        raise UserError(f"needs one image, and labels called KEY.{LABELS[0]}; has {', '.join(sorted(by_suffix))}")
    first, last = members[0][1], members[-1][1]
    start, end = first.offset, last.offset_data + last.size
    if end - start > _MOST:
        raise UserError(f"has {end - start:,} bytes")
    file.seek(start)
    data = file.read(end - start)
    if len(data) != end - start:
        raise EOFError("the file ends inside a sample")

    def part(member: tarfile.TarInfo) -> Part:
        return Part(member.offset_data - start, member.size)

    objects = by_suffix.get(OBJECTS)
    height, width = image_size(_part(data, part(images[0])))
    parts = (part(images[0]), part(labels), None if objects is None else part(objects))
    return Sample(name, start, end - start, zlib.crc32(data), *parts, height, width)


def write_shards(
    folder: Path,
    split: str,
    out: Path,
    *,
    most_bytes: int = 256 << 20,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Shard], list[str]]:
    """Write a split of a prepared folder as shards; shards that a stopped call completed are kept.

    Args:
        folder: a set in the canonical layout, whose files are copied as they are.
        split: the name of its list, without ".txt".
        out: a folder, which is made; other splits of the same set may be in it.
        most_bytes: bytes of a shard, at most, unless one sample has more; tar rounds up to 10 KiB.
        progress: called with the number of samples that are done, and of all.

    Returns:
        The shards, and a line for each image that was left out.

    Raises:
        UserError: no such set or split, other classes in `out`, or it can't be written to.
    """
    source = SegmentationFolder(folder, split)
    if len(source) == 0:
        raise UserError(f"{folder / split}.txt: lists no image that exists")
    classes = (folder / "classes.txt").read_bytes()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with hold(out / _LOCK, f"{out}: another process is writing there; wait for it"):
            own = out / "classes.txt"
            if own.exists() and read_class_list(own) != read_class_list(folder / "classes.txt"):
                raise UserError(f"{out}: holds shards of other classes; choose another folder")
            with atomic_path(own) as temporary:
                temporary.write_bytes(classes)
            return _write_all(source, out, split, most_bytes, progress)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot write there ({error.strerror or error})") from None


def _write_all(
    source: SegmentationFolder,
    out: Path,
    split: str,
    most_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[Shard], list[str]]:
    shards: list[Shard] = []
    left_out: list[str] = []
    groups, missing = _planned(source, most_bytes)
    left_out += missing
    done, total = 0, sum(map(len, groups))
    for number, group in enumerate(groups):
        path = out / f"{split}-{number:05}.tar"
        state = hashlib.sha256(repr([(name, _states(files)) for name, files in group]).encode()).hexdigest()
        if not _is_done(path, state):
            with atomic_path(path) as temporary:
                _write_tar(temporary, group)
                samples, problems = index_shard(temporary, path)
            text = {"format": FORMAT, "source": state, "bytes": path.stat().st_size, "left_out": problems}
            rows = [astuple(sample) for sample in samples]
            write_text(Path(f"{path}.json"), json_text({**text, "samples": rows}, indent=None) + "\n")
        about = json.loads(Path(f"{path}.json").read_bytes())
        left_out += about["left_out"]
        shards.append(Shard(path.name, about["bytes"], len(about["samples"])))
        done += len(group)
        if progress is not None:
            progress(done, total)
    _write_list(out, split, shards)
    for path in out.glob(f"{split}-?????.tar*"):  # of a call with smaller shards
        if path.name.partition(".")[0] not in {Path(shard.name).stem for shard in shards}:
            path.unlink()
    return shards, left_out


def _write_list(out: Path, split: str, shards: Sequence[Shard]) -> None:
    write_text(out / f"{split}{INDEX}", json_text({"format": FORMAT, "shards": list(map(asdict, shards))}) + "\n")


def _planned(source: SegmentationFolder, most_bytes: int) -> tuple[list[list[tuple[str, list[Path]]]], list[str]]:
    """Return the files of each sample of each shard, in the list's order, and what has no labels."""
    groups: list[list[tuple[str, list[Path]]]] = [[]]
    left_out = []
    room = most_bytes
    for index in range(len(source)):
        image = source.file(index)
        files = [image, label_file(image)]
        if source.knows_objects:
            files.append(source.root / FOLDER / files[1].name)
        if lacking := [path for path in files if not path.is_file()]:
            left_out.append(f"{lacking[0]}: does not exist; {image.name} is left out")
            continue
        size = sum(path.stat().st_size + 1024 for path in files) + 1024
        if size > room and groups[-1]:
            groups.append([])
            room = most_bytes
        groups[-1].append((image.name, files))
        room -= size
    return [group for group in groups if group], left_out


def _states(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _is_done(path: Path, state: str) -> bool:
    """Return whether a shard was written from files of that state."""
    try:
        about = json.loads(Path(f"{path}.json").read_bytes())
        return about["source"] == state and about["bytes"] == path.stat().st_size and about["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_tar(path: Path, group: Sequence[tuple[str, list[Path]]]) -> None:
    """Write samples in WebDataset's form; equal files give equal bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (name, (image, labels, *objects)) in enumerate(group):
            about = json.dumps({"name": Path(name).stem}).encode()
            files = [(image.suffix.lower()[1:], image.read_bytes()), (LABELS[0], labels.read_bytes())]
            files += [(OBJECTS, path.read_bytes()) for path in objects]
            for suffix, data in (*files, (ABOUT, about)):
                member = tarfile.TarInfo(f"{number:06}.{suffix}")
                member.size, member.mode = len(data), 0o644
                tar.addfile(member, io.BytesIO(data))


def adopt_shards(folder: Path, split: str, tars: Sequence[Path]) -> tuple[list[Shard], list[str]]:
    """Write the lists for shards that another program wrote, beside them; classes.txt must be there.

    Returns and raises as `write_shards` does.
    """
    read_class_list(folder / "classes.txt")
    shards, left_out = [], []
    for path in sorted(tars):
        samples, problems = index_shard(path)
        left_out += problems
        rows = [astuple(sample) for sample in samples]
        size = path.stat().st_size
        text = {"format": FORMAT, "source": "", "bytes": size, "left_out": problems, "samples": rows}
        write_text(Path(f"{path}.json"), json_text(text, indent=None) + "\n")
        shards.append(Shard(path.name, size, len(samples)))
    if not sum(shard.samples for shard in shards):
        first = f"; {left_out[0]}" if left_out else ""
        raise UserError(f"{folder}: no sample with an image and labels in {len(shards)} shards{first}")
    _write_list(folder, split, shards)
    return shards, left_out
