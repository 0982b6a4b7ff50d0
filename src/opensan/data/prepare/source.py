"""What a reader of somebody's data set hands to the engine: photographs, and how to get their labels.

A reader only says where things are and what they mean. Reading, checking and writing, in many processes, is the
engine's; so whatever is slow or may fail for one photograph belongs into the callables, not into `open`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from opensan.vocabulary import Vocabulary

ImageFile = Path | bytes | np.ndarray
"""A photograph: a file to link as it is, an encoded image file's content to write as it is, or pixels [H, W, 3] uint8
RGB to write as PNG."""


@dataclass(frozen=True)
class Labelled:
    """The labels of an image of which something could not be used."""

    labels: np.ndarray
    """As `Photograph.labels` gives them."""
    left_out: tuple[str, ...]
    """One line for each record that was left out: which one, and why ("annotation 3: has only a box")."""


@dataclass(frozen=True)
class Photograph:
    """One labelled photograph. The callables must be picklable (a function of a module with functools.partial, or a
    frozen dataclass with `__call__`); they run in other processes, and raise ValueError or OSError, one line naming
    the file, if the photograph can't be used. It is then left out, named and counted; the others go on."""

    name: str
    """Unique in the set, and a plain file stem: the engine leaves out one with separators or a leading dot."""
    splits: tuple[str, ...]
    """The lists that name it: usually one."""
    image: Path | Callable[[], ImageFile]
    labels: Callable[[], np.ndarray | Labelled]
    """[H, W] of any integer type: 0..K-1, negative where unlabelled; of the photograph's size, upright."""


@dataclass(frozen=True)
class Source:
    """A data set as its authors distribute it."""

    vocabulary: Vocabulary
    """The classes that labels are indices into."""
    photographs: Sequence[Photograph]
    """Of all splits, in the order that the lists will have."""
    evaluation_split: str | None = None
    """The list that published figures are measured on, or that own results should be."""
    label_set: str | None = None
    """The ready label set (`opensan words`) that the classes are."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Files and records that no image uses: name -> why. They count as images that are left out."""
    notes: Sequence[str] = ()
    """What was decided for the whole set, a line each: said when it is prepared, and kept in the manifest."""
    incomplete: Mapping[str, str] = field(default_factory=dict)
    """Splits of which a part is missing: name -> what. They are refused unless other splits are asked for."""
    unlabelled_because: str = ""
    """What to say if no pixel of the whole set has a label."""
    first_is_free: str = ""
    """What to say if the first class has no pixel and others have."""
    judge: Callable[[Mapping[int, int]], str | None] = lambda images_by_value: None
    """Told how many label files hold which value that is no class, says why the whole set can't be right, if so."""


@dataclass(frozen=True)
class Reader:
    """One name of `opensan data prepare NAME`."""

    name: str
    description: str
    """One line for `opensan data list`."""
    open: Callable[..., Source]
    """open(folder, **options): raises ValueError, one line, that says what is missing in the folder and what would
    be right. Option values are text, as given on the command line (KEY=VALUE)."""
    options: Mapping[str, str] = field(default_factory=dict)
    """What `open` takes besides the folder: name -> one line of help."""
    needs: str = ""
    """What the folder must hold."""
    obtained: str = ""
    """Where it is obtained."""
    terms: str = ""
    """Licence or terms, in a few words."""
    classes: int | None = None
    expected: Mapping[str, int] = field(default_factory=dict)
    """Split -> number of photographs, for sets that are the same everywhere."""
    fewer: Mapping[str, int] = field(default_factory=dict)
    """Split -> the smaller number of photographs that published lists of it also have."""
