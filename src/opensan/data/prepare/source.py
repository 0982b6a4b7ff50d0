"""Types by which readers of data sets describe them to the engine: images, and how to read their labels.

A reader only tells where files are and what they mean. Reading, checking and writing, in many processes, is the
engine's work; so slow steps, and those that may fail for one image, belong into the callables, not into `open`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from opensan.vocabulary import Vocabulary

ImageFile = Path | bytes | np.ndarray
"""An image: a file to link as it is, an encoded image file's content to write as it is, or pixels [H, W, 3] uint8
RGB to write as PNG."""


@dataclass(frozen=True)
class Labelled:
    """The labels of an image, and those of its records that could not be used."""

    labels: np.ndarray
    """Labels as `SourceImage.labels` returns them."""
    left_out: tuple[str, ...]
    """One line for each record that was left out, with the reason ("annotation 3: has only a box")."""
    objects: np.ndarray | None = None
    """[H, W] of any integer type: the number of each pixel's object, from 1; 0 for stuff and unlabelled pixels. None
    where objects are not known."""


@dataclass(frozen=True)
class SourceImage:
    """One labelled image.

    The callables must be picklable (a function of a module with functools.partial, or a frozen dataclass with
    `__call__`); they run in other processes, and raise UserError or OSError, one line naming the file, if the image
    can't be used. It is then left out, named and counted; the others are prepared.
    """

    name: str
    """Unique in the set, and a plain file stem: the engine leaves out names with separators or a leading dot."""
    splits: tuple[str, ...]
    """The lists that name it: usually one."""
    image: Path | Callable[[], ImageFile]
    labels: Callable[[], np.ndarray | Labelled]
    """[H, W] of any integer type: 0..K-1, negative where unlabelled; of the image's size, upright."""


@dataclass(frozen=True)
class Source:
    """A data set as its authors distribute it."""

    vocabulary: Vocabulary
    """The classes that labels are indices into."""
    images: Sequence[SourceImage]
    """Images of all splits, in the order of the lists."""
    evaluation_split: str | None = None
    """The list for evaluation, of published figures if there are any."""
    label_set: str | None = None
    """The ready label set (`opensan words`) with the same classes."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Files and records that no image uses: name -> reason. They count as left-out images."""
    notes: Sequence[str] = ()
    """Decisions about the whole set, a line each: printed by the preparation, and kept in the manifest."""
    incomplete: Mapping[str, str] = field(default_factory=dict)
    """Splits with missing parts: name -> the part. They are refused unless only other splits are requested."""
    unlabelled_because: str = ""
    """Message if no pixel of the whole set has a label."""
    first_is_free: str = ""
    """Message if the first class has no pixel and others have."""
    first_alone: str = ""
    """Message if all labelled pixels are of the first class, and others are unlabelled: it is not finished then."""
    judge: Callable[[Mapping[int, int]], str | None] = lambda images_by_value: None
    """Gets the number of label files by value that is not a class; returns why the set can't be right, or None."""


@dataclass(frozen=True)
class Reader:
    """One name of `opensan data prepare NAME`."""

    name: str
    description: str
    """One line for `opensan data list`."""
    open: Callable[..., Source]
    """open(folder, **options): raises UserError, one line, that names the missing part of the folder and what would
    be right. Option values are text, as given on the command line (KEY=VALUE)."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Options of `open` besides the folder: name -> one line of help."""
    needs: str = ""
    """Files that the folder must hold."""
    obtained: str = ""
    """Source of the data set."""
    terms: str = ""
    """Licence or terms, in a few words."""
    classes: int | None = None
    expected: Mapping[str, int] = field(default_factory=dict)
    """Split -> number of images, for benchmarks."""
    fewer: Mapping[str, int] = field(default_factory=dict)
    """Split -> the smaller number of images that some published lists have."""
