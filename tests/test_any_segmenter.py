"""A method without mask proposals fits wherever a segmenter fits: here, colours by name."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opensan import Encoding, Segmenter
from opensan.config import ImageConfig
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.errors import UserError
from opensan.evaluation.evaluation import evaluate, segmenter_predictor
from opensan.evaluation.measure import measure
from opensan.evaluation.predictors import AugmentedPredictor, ModelPredictor
from opensan.jobs.folder import FolderRun, plan
from opensan.jobs.tiles import ArrayRaster, Tiling, label_by_tiles
from opensan.jobs.video.job import VideoRun
from opensan.segmenters.results import InputImage
from opensan.structures import Identity
from opensan.vocabulary import Vocabulary

from .test_serve import refused, serving

CELL = 8
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (128, 128, 128)}
WORDS = ["red", "green", "blue"]


class ColourSegmenter(Segmenter):
    """Gives each cell of the image the word whose colour is nearest to the cell's mean colour."""

    identity = Identity("colours", "1" * 64, "")
    max_pixels = 1_000_000
    image_config = ImageConfig(short_side=64, long_side=256)
    device, speed, dtype = "cpu", "exact", "float32"

    def encode_prepared(self, batch):
        return [self._of_cells(image) for image in batch]

    def _of_cells(self, image: InputImage) -> Encoding:
        pixels = np.asarray(image.prepared.pixels)
        pixels = pixels * np.float32(self.image_config.std)[:, None, None]
        pixels += np.float32(self.image_config.mean)[:, None, None]
        height, width = (side // CELL for side in pixels.shape[1:])
        means = pixels.reshape(3, height, CELL, width, CELL).mean(axis=(2, 4))
        return Encoding({"colours": means}, image.prepared.sizes, self.identity.encodings, image.image)

    def prepare_words(self, vocabulary, progress=None):
        for word in vocabulary.words:
            if word.name not in COLOURS:
                raise UserError(f"word {word.name!r} is no colour: choose from {', '.join(COLOURS)}")

    def scores(self, encoding, vocabulary):
        self.prepare_words(vocabulary)
        colours = np.array([COLOURS[word.name] for word in vocabulary.words], np.float32)
        means = np.asarray(encoding["colours"])
        distance = np.linalg.norm(means[None] - colours[:, :, None, None], axis=1)
        by_cell = np.exp(-distance / 50).astype(np.float32)
        (height, width), network = encoding.sizes.image, encoding.sizes.network
        down = np.arange(height) * network[0] // height // CELL
        across = np.arange(width) * network[1] // width // CELL
        return lambda rows: by_cell[:, down[rows]][:, :, across]


@pytest.fixture(scope="module")
def colours():
    return ColourSegmenter()


def stripes(height: int = 96, width: int = 120) -> np.ndarray:
    image = np.empty((height, width, 3), np.uint8)
    for number, word in enumerate(WORDS):
        image[:, number * width // 3 : (number + 1) * width // 3] = COLOURS[word]
    return image


def expected(image: np.ndarray) -> np.ndarray:
    """Each third of the columns is a word of its own."""
    return np.broadcast_to(np.arange(image.shape[1]) * 3 // image.shape[1], image.shape[:2])


def test_it_labels_and_relabels_and_scores(colours, monkeypatch):
    monkeypatch.setattr("opensan.assemble.bands.BAND_FLOATS", 1000)
    image = stripes()
    first, second = colours.segment([image, image[:48]], WORDS)
    assert (first.labels == expected(image)).mean() > 0.9 and second.labels.shape == (48, 120)
    assert first.labels.dtype == np.int32 and first.confidence.dtype == np.float32
    assert 0.9 < np.median(first.confidence) <= 1
    again = first.relabel(["blue", "red"], background=["green"])
    assert again.areas["blue"] == pytest.approx(1 / 3, abs=0.04)
    assert (again.labels[:, 50:70] == -1).all()
    with pytest.raises(ValueError, match="'purple' is no colour"):
        first.relabel("purple")


def test_its_encodings_and_results_are_kept(colours, tmp_path):
    image = stripes()
    encoding = colours.encode(image)
    loaded = Encoding.load(encoding.save(tmp_path / "stripes.encoding"))
    assert list(loaded.arrays) == ["colours"] and loaded.sizes == encoding.sizes and loaded.nbytes == encoding.nbytes
    segmentation = colours.segment(loaded, WORDS)
    np.testing.assert_array_equal(segmentation.labels, colours.segment(image, WORDS).labels)
    written = segmentation.save(tmp_path / "out")
    assert all(path.stat().st_size for path in written.values()) and set(written) == {"png", "overlay", "json"}


def test_another_models_encoding_is_refused(colours):
    encoding = colours.encode(stripes())
    with pytest.raises(ValueError, match="made by model colours-111111111111"):
        other = ColourSegmenter()
        other.identity = Identity("colours", "2" * 64, "")
        other.segment(encoding, WORDS)


def test_a_folder_is_labelled(colours, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(stripes(60 + 12 * number)).save(folder / f"{number}.png")
    images = sorted(folder.iterdir())
    with FolderRun(
        colours, Vocabulary.parse(WORDS), plan(images, [folder]), tmp_path / "out", ["png", "coco"], batch=2
    ) as run:
        done = list(run.results())
    assert len(done) == 3 and all(one.areas["red"] == pytest.approx(1 / 3, abs=0.04) for one in done)
    assert len(list((tmp_path / "out").glob("*.labels.png"))) == 3


def prepared_folder(root: Path) -> Path:
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    for number in range(3):
        image = stripes(60, 90 + 30 * number)
        Image.fromarray(image).save(root / "images" / f"{number}.png")
        Image.fromarray(expected(image).astype(np.uint8)).save(root / "labels" / f"{number}.png")
    (root / "classes.txt").write_text("\n".join(WORDS) + "\n")
    (root / "val.txt").write_text("0\n1\n2\n")
    return root


def test_it_is_evaluated(colours, tmp_path):
    dataset = SegmentationFolder(prepared_folder(tmp_path / "stripes"), "val")
    vocabulary = dataset.vocabulary
    plain = evaluate(segmenter_predictor(colours, vocabulary), dataset, progress=False)
    assert plain.metrics.miou > 0.9
    for number, kind in enumerate((ModelPredictor, AugmentedPredictor)):
        measured = measure(dataset, kind(colours, vocabulary), tmp_path / f"out{number}", batch=2)
        assert measured.metrics.miou > 0.85


def test_the_service_answers_plainly_and_says_what_it_cannot_explain(colours):
    buffer = io.BytesIO()
    Image.fromarray(stripes()).save(buffer, "PNG")
    with serving(colours) as running:
        answer = running.client.post("/v1/encodings", content=buffer.getvalue(), headers={"Content-Type": "image/png"})
        assert answer.status_code == 201
        place = answer.headers["Location"]
        for format in ("json", "labels", "overlay", "map"):
            assert (
                running.client.post(
                    f"{place}/segmentation", json={"words": WORDS}, params={"format": format}
                ).status_code
                == 200
            )
        refused(running.client.post(f"{place}/segmentation", json={"words": ["purple"]}), 422, "is no colour")
        point = running.client.post(f"{place}/point", json={"words": WORDS, "x": 3, "y": 5})
        refused(point, 422, "an explanation of a pixel needs a model with mask proposals, and colours has none")


def test_what_needs_mask_proposals_says_so_in_one_line(colours, tmp_path):
    vocabulary = Vocabulary.parse(WORDS)
    with pytest.raises(UserError, match=r"a steadied video .* needs a model with mask proposals"):
        VideoRun(colours, vocabulary, tmp_path / "clip.mp4", tmp_path / "out")
    VideoRun(colours, vocabulary, tmp_path / "clip.mp4", tmp_path / "out", steady=False)
    image = stripes()
    with pytest.raises(UserError, match="an image by tiles needs a model with mask proposals"):
        list(label_by_tiles(colours, ArrayRaster(image), vocabulary, Tiling.plan(image.shape[:2], 64)))
