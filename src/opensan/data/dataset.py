"""The protocol of segmentation data sets."""

from typing import Protocol

import numpy as np

from opensan.vocabulary import Vocabulary


class SegmentationDataset(Protocol):
    """A labelled data set. Any object with these members can be used for training and evaluation."""

    vocabulary: Vocabulary
    """The classes; labels are indices into its words."""

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return an image [H, W, 3] uint8 RGB, and labels [H, W] int16: 0..K-1, or -1 where unlabelled.

        Raises `opensan.errors.UserError` or OSError, naming the file, when it can't be read.
        """

    def name(self, index: int) -> str:
        """Return the image's name for messages and result files."""
