"""Words fitted to marks by the service, and one line for each mistake."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import opensan

from .test_serve import PNG, refused, serving

PLAYGROUND = Path(opensan.__file__).parent / "assets" / "scenes" / "playground.png"
WORDS = ["night sky", "brick", "sand"]
SKY = {"word": "night sky", "places": [[5, 5], [200, 8], [300, 40]], "joined": True}
SAND = {"word": "sand", "places": [[320, 300], [100, 400]]}


@pytest.fixture(scope="module")
def tiny():
    return opensan.load("tiny", text_cache=False)


@pytest.fixture(scope="module")
def running(tiny):
    with serving(tiny) as service:
        yield service


@pytest.fixture
def image(running):
    return running.encode(PLAYGROUND.read_bytes())


def tune(running, image: str, *marks: dict, **more):
    question = {"words": WORDS, "images": [{"id": image, "marks": list(marks)}], **more}
    return running.client.post("/v1/tunings", json=question)


def test_a_marked_place_gets_its_word_and_vectors_can_be_asked_with(running, image, tiny):
    found = tune(running, image, SKY, SAND)
    assert found.status_code == 200, found.text
    answer = found.json()
    assert answer["pixels"] > 250 and answer["unmarked"] == ["brick"] and answer["images"] == 1
    assert answer["before"] < 0.1 and answer["after"] > 0.9  # the upper wall is no sky, and the sky below no sand
    asked = {"words": WORDS, "tuned": answer["tuned"]}
    labelled = running.client.post(f"/v1/encodings/{image}/segmentation", json=asked, headers={"Accept": "image/png"})
    assert labelled.status_code == 200
    labels = np.asarray(Image.open(io.BytesIO(labelled.content)))
    tuned = opensan.Vocabulary.parse({**asked, "background": []})
    assert (labels == tiny.segment(PLAYGROUND, tuned).labels).all()
    assert [labels[y, x] for x, y in SAND["places"]] == [2, 2] and labels[5, 5] == 0


def test_marks_of_several_images_count_together(running, image):
    second = running.encode(PLAYGROUND.read_bytes())
    images = [{"id": image, "marks": [SKY]}, {"id": second, "marks": [SAND]}]
    answer = running.client.post("/v1/tunings", json={"words": WORDS, "images": images}).json()
    assert answer["images"] == 2 and answer["after"] > 0.9


@pytest.mark.parametrize(
    ("marks", "said"),
    [
        ([SAND], "label some of another word too"),
        ([SKY, {"word": "sea", "places": [[1, 1]]}], "marks of 'sea', which is not among the words: ask for it too"),
        ([SKY, {"word": "sand", "places": [[640, 1]]}], "the point (640, 1) is outside image 1, which is 640x480"),
        ([SKY, {"word": "sand", "places": [[5, 5]]}], "is both 'night sky' and 'sand'"),
        ([SKY, {"word": "sand", "places": [[5]]}], "each a column and a row"),
        ([SKY, {"word": "sand", "places": [[-5, 1]]}], "each a column and a row"),
        ([SKY, {"word": "sand", "places": [[0, 0], [2**31 - 1, 2**31 - 1]], "joined": True}], "is outside image 1"),
        ([SKY, {"word": "sand", "places": [[1, 1]] * 2_001}], "each a column and a row"),
        ([], "images"),
    ],
)
def test_marks_that_cannot_be_learnt_are_one_line(running, image, marks, said):
    refused(tune(running, image, *marks), 422, said)


def test_an_encoding_that_is_gone_and_words_that_are_wrong(running, image):
    refused(tune(running, "nowhere", SKY, SAND), 404, "send the image again")
    refused(tune(running, image, SKY, SAND, words=["brick", "brick"]), 422, "brick")
    refused(tune(running, image, SKY, SAND, surplus=1), 422, "surplus")


def test_vectors_for_another_model_are_refused(running, image, small_model):
    answer = tune(running, image, SKY, SAND).json()
    with serving(opensan.SanSegmenter(small_model, text_cache=False)) as other:
        name = other.client.post("/v1/encodings", content=PLAYGROUND.read_bytes(), headers=PNG).json()["id"]
        asked = {"words": WORDS, "tuned": answer["tuned"]}
        refused(other.client.post(f"/v1/encodings/{name}/segmentation", json=asked), 422, "tiny")
