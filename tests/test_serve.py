"""The HTTP service over real sockets: what it answers, and what it refuses, to clients of all kinds."""

import asyncio
import base64
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

import opensan
from opensan import outputs
from opensan.assemble.interpolation import masks_at, resized_masks
from opensan.assemble.scores import label_scores, score_maps
from opensan.errors import UserError
from opensan.outputs.coco import decode_mask
from opensan.outputs.colours import PALETTES, palette
from opensan.segmenters.san import SanSegmenter
from opensan.serve import ServiceLimits, create_app
from opensan.serve.cache import EncodingCache
from opensan.serve.negotiation import best_media_type
from opensan.serve.server import Server, bind, url_of

WORDS = ["road", "car|automobile", "sky", "tree"]


@pytest.fixture(scope="module")
def segmenter(small_model) -> SanSegmenter:
    return SanSegmenter(small_model, text_cache=False)


def photograph(seed: int = 0, size: tuple[int, int] = (60, 45)) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size).save(file, "PNG")
    return file.getvalue()


class Running:
    """A service in a thread of this process."""

    def __init__(self, app) -> None:
        self.app = app
        self.listener = bind("127.0.0.1", 0)
        self.url = url_of(self.listener)
        ready = threading.Event()
        self.server = Server(app, ready.set)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()
        assert ready.wait(30)
        self.client = httpx.Client(base_url=self.url, timeout=30)

    def encode(self, data: bytes | None = None) -> str:
        return self.client.post("/v1/encodings", content=data or photograph(), headers=PNG).json()["id"]

    def ask(self, name: str, **question) -> httpx.Response:
        form = question.pop("format", None)
        accept = question.pop("accept", "*/*")
        return self.client.post(
            f"/v1/encodings/{name}/segmentation",
            json={"words": WORDS, **question},
            params={"format": form} if form else {},
            headers={"Accept": accept},
        )

    def metric(self, name: str) -> float:
        found = re.search(rf"^opensan_{re.escape(name)} (\S+)$", self.client.get("/metrics").text, re.M)
        return float(found[1]) if found else 0.0

    def raw(self, data: bytes, receive_buffer: int | None = None) -> socket.socket:
        """A connection over which `data` was sent."""
        connection = socket.socket()
        connection.settimeout(30)
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.connect(self.listener.getsockname())
        connection.sendall(data)
        return connection

    def stop(self) -> None:
        self.client.close()
        self.server.handle_exit(signal.SIGTERM, None)
        self.thread.join(30)
        assert not self.thread.is_alive()


PNG = {"Content-Type": "image/png"}


@contextmanager
def serving(segmenter, **options):
    running = Running(create_app(segmenter, **options))
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def service(segmenter):
    with serving(segmenter) as running:
        yield running


def refused(response: httpx.Response, status: int, *words: str) -> None:
    """The answer is a problem of that status, told in one line that holds `words`."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status and "\n" not in problem["detail"]
    for word in words:
        assert word in problem["detail"], problem


def until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# Answers


def test_json_holds_the_masks_of_the_segmenter(service, segmenter):
    expected = segmenter.segment(photograph(), WORDS, background=["grass"])
    answer = service.ask(service.encode(), background=["grass"])
    assert answer.status_code == 200 and answer.headers["Content-Type"] == "application/json"
    record = answer.json()
    assert [word["name"] for word in record["words"]] == ["road", "car", "sky", "tree"]
    for index, word in enumerate(record["words"]):
        np.testing.assert_array_equal(decode_mask(word["rle"], 45, 60), expected.labels == index)
        assert word["area"] == expected.areas[word["name"]]
    assert record["unlabelled"]["pixels"] == int((expected.labels < 0).sum())


def test_less_sure_pixels_are_unlabelled_on_demand(service, segmenter):
    expected = segmenter.segment(photograph(), WORDS, threshold=0.6)
    path = f"/v1/encodings/{service.encode()}/segmentation"
    record = service.client.post(f"{path}?threshold=0.6", json={"words": WORDS}).json()
    assert record["confidence"] == expected.about_confidence() and record["confidence"]["threshold"] == 0.6
    assert record["unlabelled"]["pixels"] == int((expected.labels < 0).sum()) > 0
    refused = service.client.post(f"{path}?threshold=1.5", json={"words": WORDS})
    assert refused.status_code == 422 and "threshold" in refused.json()["detail"]


def test_pixels_that_no_word_deserves_are_unlabelled_on_demand(service, segmenter):
    expected = segmenter.segment(photograph(), WORDS, rest=True)
    name = service.encode()
    record = service.ask(name, rest=True).json()
    assert record["unlabelled"]["pixels"] == int((expected.labels < 0).sum()) > 0
    assert [word["name"] for word in record["words"]] == ["road", "car", "sky", "tree"]
    files = {"image": ("a.png", photograph())}
    for value, told in (("true", record["unlabelled"]["pixels"]), ("false", 0)):
        answer = service.client.post("/v1/segmentation", data={"words": ",".join(WORDS), "rest": value}, files=files)
        assert answer.json()["unlabelled"]["pixels"] == told
    refused = service.client.post("/v1/segmentation", data={"words": "road", "rest": "maybe"}, files=files)
    assert (refused.status_code, refused.json()["detail"]) == (422, "rest: must be true or false")
    point = service.client.post(f"/v1/encodings/{name}/point", json={"words": WORDS, "rest": True, "x": 3, "y": 4})
    assert "none of these" in [word["name"] for word in point.json()["words"]]


def test_label_map_overlay_and_map(service, segmenter):
    expected = segmenter.segment(photograph(), WORDS, background=["grass"])
    name = service.encode()
    labels = service.ask(name, background=["grass"], accept="image/png")
    picture = Image.open(io.BytesIO(labels.content))
    assert picture.mode == "P"
    np.testing.assert_array_equal(np.asarray(picture), expected.labels.astype(np.uint8))

    overlay = service.ask(name, background=["grass"], format="overlay")
    shown = np.asarray(Image.open(io.BytesIO(overlay.content)))
    np.testing.assert_array_equal(shown, np.asarray(expected.overlay()))

    header, index_map, confidence = read_map(service.ask(name, background=["grass"], format="map"))
    np.testing.assert_array_equal(index_map, expected.labels.astype(np.uint8))
    assert np.abs(confidence / 255 - expected.confidence).max() <= 0.5 / 255 + 1e-6
    assert header["words"][1]["name"] == "car" and header["words"][1]["area"] == expected.areas["car"]
    assert re.fullmatch("#[0-9a-f]{6}", header["words"][0]["colour"])


def read_map(answer: httpx.Response) -> tuple[dict, np.ndarray, np.ndarray]:
    assert answer.headers["Content-Type"] == "application/vnd.opensan.map"
    data = answer.content
    length = int.from_bytes(data[:4], "little")
    assert length % 4 == 0
    header = json.loads(data[4 : 4 + length])
    shape = header["height"], header["width"]
    kind = np.dtype("<u2" if header["bytes_per_label"] == 2 else np.uint8)
    pixels = shape[0] * shape[1]
    start = 4 + length
    labels = np.frombuffer(data, kind, pixels, start).reshape(shape)
    return header, labels, np.frombuffer(data, np.uint8, pixels, start + pixels * kind.itemsize).reshape(shape)


def test_an_overlay_takes_the_colours_that_are_sent(service, segmenter):
    name = service.encode()
    words = ["brick", "night sky", "grass"]
    found = service.client.get("/v1/palettes").json()["palettes"]
    assert list(found) == list(PALETTES)
    assert [bytes.fromhex(each[1:]) for each in found["vivid"][:3]] == [bytes(each) for each in palette(3, "vivid")]
    answer = service.ask(name, words=words, format="overlay", colours={"night sky": found["vivid"][0]})
    shown = np.asarray(Image.open(io.BytesIO(answer.content)))
    result = segmenter.segment(photograph(), words)
    colours = palette(3)
    colours[1] = palette(1, "vivid")[0]
    wanted = outputs.overlay(result.image, result.labels, result.names, result.areas, colours)
    assert (shown == np.asarray(wanted)).all()
    refused(service.ask(name, words=words, colours={"moon": "#000000"}), 422, "there is no word 'moon'")
    refused(service.ask(name, words=words, colours={"brick": "red"}), 422, "colours")


@pytest.mark.filterwarnings("ignore:the model has never seen")
def test_a_map_tells_which_words_the_model_never_read():
    with serving(opensan.load("tiny", text_cache=False)) as running:
        name = running.encode()
        header, _, _ = read_map(running.ask(name, words=["brick|zeppelins", "quagga", "grass"], format="map"))
        assert header["unseen"] == ["zeppelins", "quagga"]


def test_clients_choose_among_the_models(segmenter):
    tiny = opensan.load("tiny", text_cache=False)
    loaded = []

    def load_tiny():
        loaded.append("tiny")
        return tiny

    def fail():
        raise UserError("its file is damaged")

    with serving(segmenter, others={"tiny": load_tiny, "broken": fail}) as running:
        assert running.client.get("/v1/info").json()["models"] == [segmenter.identity.name, "tiny", "broken"]
        assert not loaded
        for _ in range(2):
            made = running.client.post("/v1/encodings?model=tiny", content=photograph(), headers=PNG)
            record = running.ask(made.json()["id"], words=["brick", "grass"]).json()
            assert record["model"] == tiny.identity.encodings
        assert loaded == ["tiny"]
        made = running.client.post("/v1/encodings", content=photograph(), headers=PNG)
        assert running.ask(made.json()["id"]).json()["model"] == segmenter.identity.encodings
        form = {"files": {"image": photograph()}, "data": {"words": "brick, grass"}}
        record = running.client.post("/v1/segmentation?model=tiny", **form).json()
        assert record["model"] == tiny.identity.encodings
        refused(running.client.post("/v1/encodings?model=x", content=photograph(), headers=PNG), 422, "tiny, broken")
        answer = running.client.post("/v1/encodings?model=broken", content=photograph(), headers=PNG)
        refused(answer, 503, "broken", "damaged")


def test_more_words_than_a_byte_counts(service, segmenter):
    words = [f"thing {number}" for number in range(300)]
    expected = segmenter.segment(photograph(), words, templates="single").labels
    name = service.encode()
    header, labels, _ = read_map(service.ask(name, words=words, templates="single", format="map"))
    assert header["bytes_per_label"] == 2
    np.testing.assert_array_equal(labels, expected)
    picture = Image.open(io.BytesIO(service.ask(name, words=words, templates="single", accept="image/png").content))
    np.testing.assert_array_equal(np.asarray(picture), expected)


@pytest.mark.parametrize("words", ["road, car|automobile, sky, tree", json.dumps(WORDS)])
def test_one_request_for_a_photograph_and_words(service, segmenter, words):
    answer = service.client.post(
        "/v1/segmentation", files={"image": photograph()}, data={"words": words}, headers={"Accept": "image/png"}
    )
    labels = np.asarray(Image.open(io.BytesIO(answer.content)))
    np.testing.assert_array_equal(labels, segmenter.segment(photograph(), WORDS).labels)


def test_an_encoding_is_told_where_it_is_and_can_be_removed(service):
    answer = service.client.post("/v1/encodings", files={"image": photograph()})
    assert answer.status_code == 201
    info = answer.json()
    assert (info["width"], info["height"]) == (60, 45) and info["expires_in"] > 0
    assert answer.headers["Location"] == f"/v1/encodings/{info['id']}"
    assert service.client.delete(answer.headers["Location"]).status_code == 204
    refused(service.client.delete(answer.headers["Location"]), 404, "encoding")
    refused(service.ask(info["id"]), 404, "encoding")


def test_point_tells_what_decides_a_pixel(service, segmenter):
    x, y = 50, 10
    expected = segmenter.segment(photograph(), WORDS, background=["grass"])
    encoding = expected.encoding
    probabilities = segmenter.class_probabilities(encoding, expected.vocabulary)
    scores = score_maps(encoding.mask_logits, probabilities, encoding.sizes)[:, y, x]
    answer = service.client.post(
        f"/v1/encodings/{service.encode()}/point", json={"words": WORDS, "background": ["grass"], "x": x, "y": y}
    ).json()
    order = scores.argsort(descending=True)
    assert [word["name"] for word in answer["words"]] == [expected.vocabulary.words[k].name for k in order]
    np.testing.assert_allclose([word["score"] for word in answer["words"]], scores[order], rtol=1e-4)
    first, *rest = answer["proposals"]
    assert all(first["share"] >= other["share"] for other in rest)
    np.testing.assert_allclose(
        first["share"] * answer["words"][0]["score"], first["mask"] * first["word_probability"], rtol=1e-4
    )
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(first["picture"]))))
    scale = picture.shape[0] / 45
    assert abs(picture[int((y + 0.5) * scale), int((x + 0.5) * scale)] / 255 - first["mask"]) < 0.25


def test_masks_at_a_pixel_are_those_of_the_whole(segmenter):
    encoding = segmenter.encode(photograph())
    identity = torch.eye(len(encoding.mask_logits))
    whole = score_maps(encoding.mask_logits, identity, encoding.sizes)
    masks = encoding.mask_logits.numpy()
    np.testing.assert_allclose(masks_at(masks, encoding.sizes, 44, 7), whole[:, 44, 7], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(resized_masks(masks, encoding.sizes), whole, rtol=1e-4, atol=1e-6)
    zeros = torch.zeros(45, 60, dtype=torch.int32)
    torch.testing.assert_close(label_scores(encoding.mask_logits, identity, encoding.sizes, zeros), whole[0])


def test_service_pages(service):
    assert service.client.get("/healthz").json() == {"status": "ok"}
    assert service.client.get("/readyz").json() == {"status": "ready"}
    assert "<html" in service.client.get("/docs").text
    schema = service.client.get("/openapi.json").json()
    assert "/v1/encodings/{id}/segmentation" in schema["paths"]
    assert service.client.get("/v1/info").json()["limits"]["words"] == ServiceLimits().words
    refused(service.client.get("/nothing"), 404)
    refused(service.client.put("/v1/encodings"), 405)


def test_metrics_count_requests_by_known_routes_only(segmenter):
    with serving(segmenter) as running:
        running.ask(running.encode())
        running.client.get("/somewhere")
        running.client.request("STRANGE", "/healthz")
        text = running.client.get("/metrics").text
        assert running.metric('requests_total{code="201",method="POST",route="/v1/encodings"}') == 1
        assert running.metric("batch_images_count") == 1
        assert running.metric("cache_entries") == 1
        assert running.metric("cache_bytes") > 60 * 45 * 3
        assert running.metric("waiting_images") == 0
        assert "somewhere" not in text and "STRANGE" not in text


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "application/json"),
        ("*/*", "application/json"),
        ("image/*", "image/png"),
        ("image/png, application/json;q=0.9", "image/png"),
        ("image/png;q=0.5, */*;q=0.1", "image/png"),
        ("application/json;q=0, */*", "image/png"),
        ("text/html", None),
        ("image/png;q=0", None),
        ("image/png;q=x", None),
    ],
)
def test_negotiation(accept, expected):
    assert best_media_type(accept, ["application/json", "image/png"]) == expected


def test_what_cannot_be_answered_as_accepted_is_refused(service):
    name = service.encode()
    refused(service.ask(name, accept="text/html"), 406, "image/png")
    refused(service.ask(name, accept="application/json", format="overlay"), 406)
    refused(service.ask(name, format="tiff"), 422, "format")


# Refusals


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", ()),
        (b"{", ("JSON",)),
        (b"[" * 5000, ()),
        (b'"road"', ()),
        (b'{"words": 3}', ("words",)),
        (b'{"words": [3]}', ("words",)),
        (b'{"words": []}', ("empty",)),
        (b'{"words": ["road", "ROAD"]}', ("repeats",)),
        (b'{"words": ["road"], "colour": "red"}', ("colour",)),
        (b'{"words": ["road"], "templates": "/etc/hosts"}', ("templates",)),
        (b'{"words": ["road"], "templates": ["no place"]}', ("{}",)),
        (b'{"words": ["a\\u0000b"]}', ("control",)),
        (b'{"words": ["\\ud800"]}', ()),
        (b'{"words": [{"name": "a", "text": 3}]}', ("words",)),
        (b'{"words": "' + b"a b " * 4000 + b'"}', ("tokens",)),
        (b"\xff\xfe", ()),
    ],
)
def test_bad_questions_are_refused_in_one_line(service, body, words):
    name = service.encode()
    answer = service.client.post(
        f"/v1/encodings/{name}/segmentation", content=body, headers={"Content-Type": "application/json"}
    )
    refused(answer, 400 if answer.status_code == 400 else 422, *words)


@pytest.mark.parametrize(
    ("data", "media_type", "status"),
    [
        (b"", "image/png", 422),
        (b"garbage", "image/png", 422),
        (photograph()[:-40], "image/png", 422),
        (b"http://localhost/x.png", "image/png", 422),
        (photograph(), "text/plain", 415),
        (photograph(), "", 415),
        (photograph(), "multipart/form-data", 400),
        (b"--x\r\ngarbage", "multipart/form-data; boundary=x", 422),
    ],
)
def test_bad_photographs_are_refused_in_one_line(service, data, media_type, status):
    refused(service.client.post("/v1/encodings", content=data, headers={"Content-Type": media_type}), status)


def test_bad_forms_are_refused_in_one_line(service):
    def send(data, **files):
        return service.client.post("/v1/segmentation", data=data, files=files or {"image": photograph()})

    refused(send({}), 422, "words")
    refused(send({"words": "road", "colour": "red"}), 422, "colour")
    refused(send({"words": "[3"}), 422, "JSON")
    refused(send({"words": "road"}, picture=photograph()), 422, "image")
    refused(send({"words": "road", "templates": "/etc/hosts"}), 422, "templates")
    refused(service.client.post("/v1/segmentation", data={"image": "/etc/hosts", "words": "road"}), 415)


def test_limits_hold(segmenter):
    limits = ServiceLimits(request_bytes=20_000, pixels=3000, words=3, characters=40, templates=2)
    with serving(segmenter, limits=limits) as running:
        long = bytes(20_001)
        refused(running.client.post("/v1/encodings", content=long, headers=PNG), 413, "20,000 bytes")
        chunks = (bytes(5000) for _ in range(5))  # sent without a length
        refused(running.client.post("/v1/encodings", content=chunks, headers=PNG), 413, "20,000 bytes")
        refused(running.client.post("/v1/encodings", content=photograph(size=(60, 60)), headers=PNG), 422, "3,000")
        name = running.encode()
        refused(running.ask(name, words=["a", "b|c", "d"]), 422, "limit of 3")
        refused(running.ask(name, words=["a"], background="b,c,d"), 422, "limit of 3")
        refused(running.ask(name, words=[{"name": "a", "synonyms": ["b", "c", "d"]}]), 422, "limit of 3")
        refused(running.ask(name, words="x" * 41), 422, "characters")
        refused(running.ask(name, words="x", templates=["a {}", "b {}", "c {}"]), 422, "templates")
        refused(running.ask(name, words=" " * (1 << 20)), 413)
        outside = {"words": ["a"], "x": 60, "y": 0}
        refused(running.client.post(f"/v1/encodings/{name}/point", json=outside), 422, "60 x 45")
        assert running.ask(name, words=["a", "b|c"]).status_code == 200


def test_all_uploads_together_are_bounded(segmenter):
    head = b"POST /v1/encodings HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 9000\r\n\r\n"
    with serving(segmenter, limits=ServiceLimits(upload_bytes=20_000)) as running:
        slow = [running.raw(head + bytes(8000)) for _ in range(2)]
        with running.raw(head + bytes(8000)) as third:
            assert third.recv(100).startswith(b"HTTP/1.1 429")
        for connection in slow:
            connection.close()
        until(lambda: running.client.post("/v1/encodings", content=photograph(), headers=PNG).status_code == 201)


def test_a_token_keeps_strangers_out(segmenter):
    with serving(segmenter, token="sésame") as running:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sésame".encode()}):
            answer = running.client.post("/v1/encodings", content=photograph(), headers={**PNG, **headers})
            refused(answer, 401)
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        refused(running.client.get("/metrics"), 401)
        assert running.client.get("/healthz").status_code == running.client.get("/readyz").status_code == 200
        right = {"Authorization": "Bearer sésame".encode()}
        assert running.client.post("/v1/encodings", content=photograph(), headers={**PNG, **right}).status_code == 201
        assert running.client.get("/metrics", headers=right).status_code == 200


def test_cache_is_bounded(segmenter):
    encoding = segmenter.encode(photograph())
    size = encoding.nbytes
    now = [0.0]

    async def work() -> None:
        cache = EncodingCache(3, 10 * size, 100, clock=lambda: now[0])
        first, second, third = [await cache.add(encoding) for _ in range(3)]
        now[0] = 60
        assert await cache.get(first) is encoding
        fourth = await cache.add(encoding)  # the second was used least recently
        assert await cache.get(second) is None and len(cache) == 3 and cache.size == 3 * size
        now[0] = 101
        assert await cache.get(third) is None and await cache.get(first) is encoding
        now[0] = 201
        assert await cache.get(first) is None and await cache.get(fourth) is None and len(cache) == cache.size == 0
        few = EncodingCache(10, int(2.5 * size), 100)
        names = [await few.add(encoding) for _ in range(3)]
        assert [await few.get(name) is not None for name in names] == [False, True, True]
        assert len(set(names)) == 3 and all(len(name) >= 22 for name in names)

    asyncio.run(work())


# Load, and clients that misbehave


def in_threads(work, count: int) -> tuple[list[threading.Thread], list]:
    answers: list = [None] * count

    def one(index: int) -> None:
        answers[index] = work(index)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    return threads, answers


def test_a_full_queue_refuses_at_once_and_answers_what_it_accepted(segmenter, held):
    with serving(segmenter, limits=ServiceLimits(waiting=3)) as running:

        def send(index):
            return httpx.post(
                f"{running.url}/v1/segmentation?format=labels",
                files={"image": photograph(index)},
                data={"words": json.dumps(WORDS)},
                timeout=30,
            )

        threads, answers = in_threads(send, 3)
        until(lambda: running.metric("waiting_images") == 3)
        too_many = send(9)
        refused(too_many, 429, "waiting")
        assert int(too_many.headers["Retry-After"]) >= 1
        assert running.client.get("/healthz").status_code == 200
        held.set()
        for thread in threads:
            thread.join()
        for index, answer in enumerate(answers):
            labels = np.asarray(Image.open(io.BytesIO(answer.content)))
            np.testing.assert_array_equal(labels, segmenter.segment(photograph(index), WORDS).labels)


def test_photographs_that_wait_are_encoded_together(segmenter, held):
    with serving(segmenter, batch=4) as running:
        first, _ = in_threads(lambda _: running.encode(photograph(0)), 1)
        until(lambda: running.metric("waiting_images") == 1)
        time.sleep(0.1)  # the first is in the network by now
        sizes = [(60, 45), (60, 45), (45, 60), (60, 45)]
        threads, names = in_threads(lambda index: running.encode(photograph(index, sizes[index])), 4)
        until(lambda: running.metric("waiting_images") == 5)
        time.sleep(0.1)
        held.set()
        for thread in first + threads:
            thread.join()
        assert running.metric('batch_images_bucket{le="1.0"}') == 2
        assert running.metric('batch_images_bucket{le="2.0"}') == 2
        assert running.metric('batch_images_bucket{le="3.0"}') == 3  # three of one shape
        for index, name in enumerate(names):
            labels = np.asarray(Image.open(io.BytesIO(running.ask(name, format="labels").content)))
            np.testing.assert_array_equal(labels, segmenter.segment(photograph(index, sizes[index]), WORDS).labels)


def test_who_waited_too_long_is_told_so(segmenter, held):
    with serving(segmenter, limits=ServiceLimits(queue_seconds=0.3)) as running:
        answer = running.client.post("/v1/encodings", content=photograph(), headers=PNG)
        refused(answer, 503, "0.3 s")
        assert "Retry-After" in answer.headers
        held.set()
        until(lambda: running.client.post("/v1/encodings", content=photograph(), headers=PNG).status_code == 201)


def test_a_client_that_leaves_makes_room(segmenter, held):
    head = f"POST /v1/encodings HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(photograph())}"
    with serving(segmenter, limits=ServiceLimits(waiting=3), batch=1) as running:
        threads, names = in_threads(lambda _: running.encode(), 1)
        until(lambda: running.metric("waiting_images") == 1)
        leaving = [running.raw(head.encode() + b"\r\n\r\n" + photograph()) for _ in range(2)]
        until(lambda: running.metric("waiting_images") == 3)
        for connection in leaving:
            connection.close()
        until(lambda: running.metric("waiting_images") == 1)
        held.set()
        threads[0].join()
        assert running.ask(names[0]).status_code == 200
        assert running.metric("batch_images_count") == 1  # nobody's photographs were not encoded


def test_clients_that_stall_are_let_go(segmenter):
    body = b"POST /v1/encodings HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 900\r\n\r\nabc"
    with serving(segmenter, limits=ServiceLimits(client_seconds=0.4)) as running:
        with running.raw(body) as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
        for start in (b"", b"POST /v1/enc"):
            with running.raw(start) as connection, pytest.raises(ConnectionError):
                if connection.recv(100) == b"":
                    raise ConnectionError
        assert running.ask(running.encode()).status_code == 200


def test_a_client_that_does_not_read_is_let_go(segmenter):
    big = photograph(size=(500, 400))
    with serving(segmenter, limits=ServiceLimits(client_seconds=0.3)) as running:
        running.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # of the connections to come
        name = running.encode(big)
        question = json.dumps({"words": WORDS}).encode()
        head = f"POST /v1/encodings/{name}/segmentation?format=map HTTP/1.1\r\nHost: x\r\nContent-Type: "
        head += f"application/json\r\nContent-Length: {len(question)}\r\n\r\n"
        with running.raw(head.encode() + question, receive_buffer=4096) as connection:
            until(lambda: not running.app.gate.empty())
            until(lambda: running.app.gate.empty())  # handed to the connection
            time.sleep(1.0)
            received = 0
            while data := connection.recv(1 << 20):
                received += len(data)
            assert 0 < received < 2 * 500 * 400
        assert running.ask(name).status_code == 200


def test_who_is_refused_while_sending_can_read_why(segmenter):
    """A connection closed on what was not read would be reset, and the answer lost."""
    head = b"POST /v1/encodings HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 8000000\r\n\r\n"
    with serving(segmenter, limits=ServiceLimits(request_bytes=1000, client_seconds=1.0)) as running:
        with running.raw(head) as connection:
            connection.sendall(bytes(8_000_000))
            assert connection.recv(100).startswith(b"HTTP/1.1 413")
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            until(lambda: b'{"status":"ok"}' in connection.recv(1000))
        with running.raw(head) as endless, pytest.raises(ConnectionError):
            for _ in range(1000):
                endless.sendall(bytes(10))
                time.sleep(0.01)


def test_garbage_harms_nobody(service):
    name = service.encode()
    for seed in range(5):
        with service.raw(np.random.default_rng(seed).bytes(3000) + b"\r\n\r\n") as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
    assert service.ask(name).status_code == 200


def test_a_stop_finishes_what_was_accepted_and_refuses_the_rest(segmenter, held):
    running = Running(create_app(segmenter))
    stalled = running.raw(
        b"POST /v1/encodings HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 9000\r\n\r\nabc"
    )
    threads, answers = in_threads(
        lambda _: httpx.post(f"{running.url}/v1/encodings", content=photograph(), headers=PNG, timeout=30), 1
    )
    until(lambda: running.metric("waiting_images") == 1)
    running.server.handle_exit(signal.SIGTERM, None)
    refused(running.client.post("/v1/encodings", content=photograph(), headers=PNG), 503, "stopping")
    refused(running.client.get("/readyz"), 503, "stopping")
    assert running.client.get("/healthz").status_code == 200
    assert stalled.recv(100).startswith(b"HTTP/1.1 503")
    assert running.thread.is_alive()
    held.set()
    running.thread.join(30)
    threads[0].join()
    assert not running.thread.is_alive() and answers[0].status_code == 201
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.url}/healthz")
    running.client.close()
    stalled.close()


BAD_FORM = (
    b"POST /v1/encodings HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    b"Content-Length: 20\r\n\r\n--x\r\nA\rgarbage\r\n\r\n--"
)


def test_the_command_serves_and_stops(tmp_path):
    command = [sys.executable, "-m", "opensan", "serve", "--model", "tiny", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = process.stderr.readline().split()[-1]
        assert httpx.get(f"{url}/readyz").status_code == 200
        answer = httpx.post(f"{url}/v1/segmentation", files={"image": photograph()}, data={"words": "zyx,cat"})
        assert [word["name"] for word in answer.json()["words"]] == ["zyx", "cat"]
        port = url.rpartition(":")[2]
        second = subprocess.run([*command[:-1], port], capture_output=True, text=True)
        assert second.returncode == 1 and "cannot listen at 127.0.0.1" in second.stderr
        assert len(second.stderr.splitlines()) == 1
        for garbage in (b"\xff\0garbage\r\n\r\n", BAD_FORM):
            with socket.create_connection(("127.0.0.1", int(port)), timeout=30) as connection:
                connection.sendall(garbage)
                assert connection.recv(100).startswith(b"HTTP/1.1 4")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""  # strangers write no log
    finally:
        process.kill()
