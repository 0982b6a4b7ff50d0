"""What every segmentation data set offers, wherever its photographs come from."""

from typing import Protocol

import numpy as np

from opensan.vocabulary import Vocabulary


class SegmentationDataset(Protocol):
    """Labelled photographs. Anything with these members can be trained on and evaluated."""

    vocabulary: Vocabulary
    """The words that labels are indices into."""

    def __len__(self) -> int:
        """The number of photographs."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Photograph [H, W, 3] uint8 RGB, and labels [H, W] int16: 0..K-1, or -1 where unlabelled.

        Raises `opensan.errors.UserError` or OSError, naming the file, when it can't be read.
        """

    def name(self, index: int) -> str:
        """What messages and result files call the photograph."""
