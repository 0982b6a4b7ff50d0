"""Read images without labels, to train on what a teacher says about them."""

from pathlib import Path

import numpy as np

from opensan.images import list_images, open_image
from opensan.vocabulary import Vocabulary


class UnlabelledFolder:
    """The images in a folder and below it, and the words that they are to be labelled with."""

    def __init__(self, root: str | Path, vocabulary: Vocabulary) -> None:
        """List the images; they are read on access.

        Raises UserError, one line, if the folder does not exist, can't be listed or holds no image.
        """
        self.root = Path(root)
        self.vocabulary = vocabulary
        self.files = list_images([self.root])

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Return the image's name for messages."""
        return self.files[index].name

    def image(self, index: int) -> np.ndarray:
        """Return an image [H, W, 3] uint8 RGB. Raises UserError, one line, if it can't be read."""
        return open_image(self.files[index])
