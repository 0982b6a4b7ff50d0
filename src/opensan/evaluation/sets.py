"""Find and open prepared data sets for an evaluation."""

from dataclasses import dataclass
from pathlib import Path

from opensan.data.canonical import MANIFEST, read_manifest
from opensan.data.prepare.own_images import NO_SPLIT
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.errors import UserError
from opensan.vocabulary import ready_source_ids


@dataclass(frozen=True)
class PreparedSet:
    """One split of a prepared folder."""

    name: str
    """The folder's name."""
    label_set: str | None
    """The ready label set with the same classes, if the manifest names one."""
    dataset: SegmentationFolder

    def class_of_id(self) -> dict[int, int]:
        """Return the data set's own number of each class -> its index. Raises UserError if it has no such numbers."""
        ids = ready_source_ids(self.label_set) if self.label_set else None
        if ids is None:
            raise UserError(
                f"{self.dataset.root}: its label set ({self.label_set or 'none that is known'}) has no category ids of "
                "its own; leave --category-ids at contiguous"
            )
        return {number: index for index, number in enumerate(ids)}


def open_set(root: Path, split: str | None = None) -> PreparedSet:
    """Open `split` of a prepared folder; by default the one its manifest names for evaluation, or else `val`.

    A set that was prepared without lists has the list `all` alone, which is taken then.

    Raises UserError, one line, naming the lists that exist.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; a data set is prepared by `opensan data prepare`")
    manifest = read_manifest(root)
    lists = sorted(path.stem for path in root.glob("*.txt") if path.name != "classes.txt")
    split = split or (manifest and manifest.evaluation_split) or (NO_SPLIT if lists == [NO_SPLIT] else "val")
    if split not in lists:
        if not lists:
            raise UserError(f"{root}: not a data set, it has no lists; one is made by `opensan data prepare`")
        raise UserError(f"{root}: has no list {split}.txt; there are {', '.join(lists)}: choose one with --split")
    name = root.resolve().name
    return PreparedSet(name, manifest.label_set if manifest else None, SegmentationFolder(root, split))


def find_sets(root: Path) -> list[Path]:
    """Return the prepared folders directly below `root`, by name. Raises UserError if there are none."""
    folders = sorted(path.parent for path in root.glob(f"*/{MANIFEST}"))
    if not folders:
        raise UserError(f"{root}: holds no prepared data sets (folders with a {MANIFEST})")
    return folders
