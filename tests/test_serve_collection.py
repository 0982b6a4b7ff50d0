"""The service's search of a collection."""

import base64
import io
import json
import shutil

import pytest
from PIL import Image

pytest.importorskip("lancedb", reason="indexes need lancedb")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from fastapi.testclient import TestClient

import opensan
from opensan.errors import UserError
from opensan.files import ASSETS
from opensan.serve import create_app

SCENES = ASSETS / "scenes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collection") / "scenes"
    opensan.Index(folder, "tiny").add(SCENES)
    return folder


@pytest.fixture(scope="module")
def tiny():
    return opensan.load("tiny", text_cache=False)


@pytest.fixture(scope="module")
def client(folder, tiny):
    with TestClient(create_app(tiny, index=folder)) as client:
        yield client


def test_matches_come_best_first_with_their_pictures(client, folder):
    assert client.get("/v1/info").json()["collection"] is True
    assert client.get("/v1/collection").json() == {"name": "scenes", "images": 3}
    response = client.post("/v1/collection/search", json={"words": "green heart", "top": 2})
    assert response.status_code == 200 and response.headers["content-type"] == "application/x-ndjson"
    *matches, end = [json.loads(line) for line in response.text.splitlines()]
    expected = opensan.Index(folder).search("green heart", top=2)
    assert [match["name"] for match in matches] == [match.path.rpartition("/")[2] for match in expected]
    assert [match["score"] for match in matches] == pytest.approx([match.score for match in expected], abs=1e-5)
    assert end == {"kind": "end", "images": 3, "approximate": False}
    picture = Image.open(io.BytesIO(base64.b64decode(matches[0]["picture"])))
    assert picture.size == (matches[0]["width"], matches[0]["height"]) == (400, 300)
    assert str(SCENES) not in response.text  # folders stay here


@pytest.mark.parametrize(
    "question",
    [
        {"words": ""},
        {"words": " "},
        {"words": "a, b"},
        {"words": "zeppelin"},
        {"words": "grass", "also": ["zeppelin"]},
        {"words": "grass", "top": 0},
        {"words": "grass", "folder": "/etc"},
        {"words": "x" * 301},
        {},
    ],
)
def test_questions_that_mean_nothing_are_one_line(client, question):
    response = client.post("/v1/collection/search", json=question)
    assert response.status_code == 422 and "\n" not in response.json()["detail"]


def test_an_index_that_cant_be_searched_is_refused_at_the_start(folder, tiny, tmp_path, fresh_model):
    with pytest.raises(UserError, match="no index"):
        create_app(tiny, index=tmp_path / "none")
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    shutil.rmtree(damaged / "proposals.lance" / "data")
    shutil.rmtree(damaged / "proposals.lance" / "_versions")
    with pytest.raises(UserError, match="damaged or half copied"):
        create_app(tiny, index=damaged)
    other = opensan.SanSegmenter(fresh_model(), text_cache=False)
    with pytest.raises(UserError, match="was made by model tiny"):
        create_app(other, index=folder)


def test_an_index_that_goes_is_told(tiny, folder, tmp_path):
    index = shutil.copytree(folder, tmp_path / "index")
    with TestClient(create_app(tiny, index=index)) as client:
        shutil.rmtree(index)
        response = client.post("/v1/collection/search", json={"words": "grass"})
        assert response.status_code == 422 and "no index" in response.json()["detail"]
        assert client.get("/v1/collection").status_code == 422


def test_a_service_without_an_index_has_no_collection(tiny):
    with TestClient(create_app(tiny)) as client:
        assert client.get("/v1/info").json()["collection"] is False
        assert client.get("/v1/collection").status_code == 404
