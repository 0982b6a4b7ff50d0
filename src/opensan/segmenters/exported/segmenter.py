"""The segmenter of exported models, run by onnxruntime or OpenVINO; needs no torch.

Letters: Q queries, K words, R text rows, D embedding, h w stride-16 grid, H0 W0 the image.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from opensan.assemble.bands import BAND_FLOATS, first_equal, row_bands, to_array
from opensan.assemble.interpolation import interpolation_matrices
from opensan.config import TOKENIZER_NAME
from opensan.errors import UserError
from opensan.images import MAX_PIXELS
from opensan.segmenters.exported.manifest import read_folder
from opensan.segmenters.exported.runtimes import SUFFIXES, Run, open_graph
from opensan.segmenters.exported.text import WORDS_NAME, EmbeddedWords, ExportedText
from opensan.segmenters.proposals import ProposalSegmenter, with_nothing
from opensan.segmenters.results import Encoding, InputImage, Segmentation
from opensan.structures import Identity
from opensan.vocabulary import Vocabulary


class ExportedSegmenter(ProposalSegmenter):
    """An exported model for inference; use `opensan.load` to make one."""

    def __init__(
        self, folder: Path, *, max_pixels: int = MAX_PIXELS, text_cache: bool = True, threads: int = 0
    ) -> None:
        """`threads` of the runtime; 0 lets it choose. Raises UserError, one line, on a damaged folder."""
        config, manifest = read_folder(folder)
        if manifest.format not in SUFFIXES:
            raise UserError(
                f"{folder}: holds .pt2 files, for torch.export.load, which runs whatever such a file says; "
                "export the model as onnx or openvino to use it here"
            )
        self.config = config
        self.identity = Identity(config.name, manifest.image, manifest.text_tower)
        self.max_pixels = max_pixels
        self.image_config = config.image
        self.rest_share = config.rest_share
        self.device = "cpu"
        self.speed, self.dtype = manifest.format, manifest.dtype

        def graph(name: str, *, narrow: bool = False, later: bool = False) -> Run:
            path = folder / f"{name}{SUFFIXES[manifest.format]}"
            return open_graph(path, threads=threads, narrow=narrow, later=later)

        # Words are computed in float32 for any precision of the image half, because they take little time.
        self._image = graph("image", narrow=manifest.dtype == "bfloat16")
        self._words, self._labels = graph("words"), graph("labels")
        clip = config.clip
        self.text = ExportedText(
            graph("text", later=True) if manifest.text else None,  # the cache holds most words
            EmbeddedWords.load(folder / WORDS_NAME, clip.embed_dim),
            manifest,
            clip,
            disk_cache=text_cache,
            tokenizer=_read_tokenizer(folder / TOKENIZER_NAME) if clip.text.own_tokenizer else None,
        )
        self.text.model = self.identity

    def encode_prepared(self, batch: Sequence[InputImage]) -> list[Encoding]:
        """Run images of one padded shape through the network."""
        masks, embeddings = self._image(pixels=np.stack([to_array(image.prepared.pixels) for image in batch]))
        # Copies, because a view would keep the whole batch's arrays in memory.
        return [
            Encoding(
                {"mask_logits": mask.copy(), "mask_embeddings": embedding.copy()},
                image.prepared.sizes,
                self.identity.encodings,
                image.image,
            )
            for mask, embedding, image in zip(masks, embeddings, batch, strict=True)
        ]

    def winners(self, encoding: Encoding, vocabulary: Vocabulary) -> np.ndarray:
        """Return each pixel's word index, [H0, W0] int32; see `Segmenter.winners`."""
        return np.concatenate([labels for labels, _ in self._bands(encoding, vocabulary)])

    def confidence(self, segmentation: Segmentation) -> np.ndarray:
        """Return the confidence, [H0, W0] float32; see `Segmentation.confidence`."""
        if segmentation.calibration is not None:
            return super().confidence(segmentation)
        bands = self._bands(segmentation.encoding, segmentation.vocabulary)
        return np.clip(np.concatenate([scores for _, scores in bands]), 0, 1)

    def class_probabilities(self, encoding: Encoding, vocabulary: Vocabulary) -> np.ndarray:
        """Return class probabilities [Q, K]; see `ProposalSegmenter.class_probabilities`."""
        rows = self.text.classifier(vocabulary)
        (probabilities,) = self._words(
            mask_embeddings=to_array(encoding["mask_embeddings"]),
            rows=rows,
            rows_of_word=first_equal(rows)[rows_of_words(vocabulary)],  # equal rows give exactly equal probabilities
        )
        return with_nothing(probabilities, vocabulary)

    def _bands(self, encoding: Encoding, vocabulary: Vocabulary) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield labels and scores of a band of rows at a time, so that memory does not grow with words times pixels."""
        probabilities = self.class_probabilities(encoding, vocabulary)
        first = first_equal(probabilities.T)  # rounding must not choose between equal words
        names = np.flatnonzero(first == np.arange(len(first)))
        probabilities = np.ascontiguousarray(probabilities[:, names])
        masks = to_array(encoding["mask_logits"])
        down, across = interpolation_matrices(masks.shape[1:], encoding.sizes)
        for rows in row_bands(len(down), sum(probabilities.shape) * len(across), BAND_FLOATS):
            labels, scores = self._labels(
                probabilities=probabilities, mask_logits=masks, down=down[rows], across=across
            )
            yield names.astype(np.int32)[labels], scores


def _read_tokenizer(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path}: not readable ({error.strerror or error}); an exported model is a whole folder"
        ) from None


def rows_of_words(vocabulary: Vocabulary) -> np.ndarray:
    """Return [K, S] int64: the text rows of each word; a word with fewer synonyms than another repeats its first."""
    counts = np.bincount(vocabulary.row_class)
    first = np.cumsum(counts) - counts
    step = np.arange(counts.max())
    return first[:, None] + np.where(step < counts[:, None], step, 0)
