"""What hostile photographs, words and requests cost the HTTP service, and what becomes of it when the model fails."""

import asyncio
import io
import threading
import time
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
from PIL import Image

from opensan.images import ImageError
from opensan.segmenters.san import SanSegmenter
from opensan.serve import ServiceLimits
from opensan.serve.engine import Engine
from opensan.serve.metrics import Metrics
from opensan.serve.photographs import MOST_SCANS, decode, more_scans
from opensan.serve.schemas import PROMPTS_AT_ONCE, text_parts
from opensan.text.tokenizer import Tokenizer
from opensan.vocabulary import Vocabulary
from tests.test_serve import PNG, in_threads, photograph, refused, serving, until


@pytest.fixture(scope="module")
def segmenter(small_model) -> SanSegmenter:
    return SanSegmenter(small_model, text_cache=False)


def jpeg(size: tuple[int, int] = (64, 48), **options) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(photograph(size=size))).save(file, "JPEG", **options)
    return file.getvalue()


def with_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan, with its tables, comes again and again."""
    data = jpeg(progressive=True)
    last = data[data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda")) : -2]
    return data[:-2] + last * (count - data.count(b"\xff\xda")) + data[-2:]


def test_a_jpeg_of_very_many_scans_is_not_decoded(segmenter):
    """Each is a pass over the photograph: 290 kB took a decoder minutes, which nothing can interrupt."""
    usual = jpeg(progressive=True)
    assert 5 < usual.count(b"\xff\xda") < MOST_SCANS
    assert decode(with_scans(MOST_SCANS), ServiceLimits()).shape == (48, 64, 3)
    with pytest.raises(ImageError, match="more than 64 scans"):
        decode(with_scans(MOST_SCANS + 1), ServiceLimits())
    with serving(segmenter) as running:
        refused(running.client.post("/v1/encodings", content=with_scans(5000), headers=PNG), 422, "scans")


def test_scans_are_counted_as_the_decoder_meets_them():
    scan = b"\xff\xda"
    assert not more_scans(jpeg() + 1000 * scan, MOST_SCANS)  # behind the end, as of a film
    comment = b"\xff\xfe" + (2002).to_bytes(2) + 1000 * scan
    data = jpeg()
    assert not more_scans(data[:2] + comment + data[2:], MOST_SCANS)
    assert more_scans(data[:2] + 1000 * (scan + b"\0\x02"), MOST_SCANS)
    assert not more_scans(photograph() + 1000 * scan, MOST_SCANS)
    for end in range(0, len(data), 7):
        assert not more_scans(data[:end], MOST_SCANS)


def test_a_photograph_that_is_all_length_is_refused(segmenter):
    """Labelling makes a matrix of every column by every cell of the grid: gigabytes for 25 million columns."""
    file = io.BytesIO()
    Image.new("L", (70_000, 1)).save(file, "PNG")
    with serving(segmenter) as running:
        refused(running.client.post("/v1/encodings", content=file.getvalue(), headers=PNG), 422, "70,000 x 1", "65,535")
    assert decode(photograph(size=(300, 1)), ServiceLimits(side=300)).shape == (1, 300, 3)


def test_what_is_kept_is_what_is_counted(segmenter):
    """Encodings of a batch must not keep each other in memory."""

    async def encode_together() -> list:
        engine = Engine(segmenter, ServiceLimits(), Metrics(), batch=3)
        try:
            return await asyncio.gather(*(engine.encode(photograph(seed)) for seed in range(3)))
        finally:
            engine.close()

    encodings = asyncio.run(encode_together())
    for encoding in encodings:
        held = sum(tensor.untyped_storage().nbytes() for tensor in (encoding.mask_logits, encoding.mask_embeddings))
        assert held + encoding.image.nbytes == encoding.nbytes
        assert encoding.image.base is None


def test_long_pieces_of_text_are_not_remembered():
    tokenizer = Tokenizer()
    assert tokenizer.encode("x" * 3000) == tokenizer.encode("x" * 3000)
    assert tokenizer._remembered.cache_info().currsize == 0
    assert tokenizer.encode("road") and tokenizer._remembered.cache_info().currsize == 1


def test_long_vocabularies_are_read_in_parts_that_make_all_their_rows(segmenter):
    words = [{"name": f"thing {n}", "synonyms": [f"object {n}"]} for n in range(40)]
    words += [{"name": "told", "text": "in full", "prompts": ["some told thing", "another"], "synonyms": ["tale"]}]
    vocabulary = Vocabulary.parse(words, background=["grass"])
    parts = text_parts(vocabulary)
    assert len(parts) > 3
    assert all(sum(map(len, part.prompts())) <= PROMPTS_AT_ONCE for part in parts)
    assert [row for part in parts for row in part.prompts()] == vocabulary.prompts()
    assert text_parts(Vocabulary.parse(words[:2])) == []
    fresh = SanSegmenter(segmenter.model, text_cache=False)
    for part in parts:
        fresh.text.classifier(part)
    embedded = []
    fresh.text._embed_tree = embedded.append
    np.testing.assert_allclose(fresh.text.rows(vocabulary), segmenter.text.rows(vocabulary), atol=1e-6)
    assert embedded == []


def test_others_are_answered_between_the_parts_of_a_long_vocabulary(segmenter, monkeypatch):
    """And what nobody waits for any more is not read to its end."""
    read = threading.Semaphore(0)
    parts, original = [], segmenter.text.classifier

    def slowly(vocabulary, **options):
        if len(vocabulary.words) == 10:
            parts.append(vocabulary)
            assert read.acquire(timeout=30)
        return original(vocabulary, **options)

    monkeypatch.setattr(segmenter.text, "classifier", slowly)
    long = {"words": [f"thing {n}" for n in range(100)], "templates": [f"{n} {{}}" for n in range(25)]}
    with serving(segmenter, limits=ServiceLimits(queue_seconds=3)) as running:
        name = running.encode()
        threads, answers = in_threads(
            lambda _: httpx.post(f"{running.url}/v1/encodings/{name}/segmentation", json=long, timeout=30), 2
        )
        until(lambda: len(parts) == 2)  # all threads that label are taken
        small, found = in_threads(lambda _: running.ask(name), 1)
        time.sleep(0.2)
        read.release()
        small[0].join()
        assert found[0].status_code == 200
        for thread in threads:
            thread.join()
        for answer in answers:
            refused(answer, 503, "3 s")
        for _ in range(20):
            read.release()
        until(lambda: running.metric("waiting_questions") == 0)
        assert running.ask(name).status_code == 200
    assert len(parts) <= 4


@contextmanager
def failing(segmenter, monkeypatch, bad: bytes):
    """The network fails on any batch that holds the photograph `bad`."""
    shade = np.asarray(Image.open(io.BytesIO(bad)).convert("RGB"))
    through = segmenter.encode_prepared

    def encode(batch):
        if any(np.array_equal(one.image, shade) for one in batch):
            raise RuntimeError("the network failed")
        return through(batch)

    with monkeypatch.context() as patch:
        patch.setattr(segmenter, "encode_prepared", encode)
        yield


def test_a_photograph_on_which_the_network_fails_costs_no_other_one(segmenter, monkeypatch):
    with failing(segmenter, monkeypatch, photograph(1)), serving(segmenter, batch=4) as running:
        threads, answers = in_threads(
            lambda seed: httpx.post(f"{running.url}/v1/encodings", content=photograph(seed), headers=PNG, timeout=30), 3
        )
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [201, 500, 201]
        refused(answers[1], 500)
        assert running.metric("waiting_images") == 0
        assert running.client.get("/readyz").status_code == 200
        assert running.ask(answers[2].json()["id"]).status_code == 200


def test_a_model_that_hangs_makes_the_service_unready_until_it_goes_on(segmenter, held):
    with serving(segmenter, limits=ServiceLimits(queue_seconds=0.3)) as running:
        assert running.client.get("/readyz").status_code == 200
        refused(running.client.post("/v1/encodings", content=photograph(), headers=PNG), 503, "0.3 s")
        refused(running.client.get("/readyz"), 503, "nothing was finished")
        assert running.client.get("/healthz").status_code == 200
        held.set()
        until(lambda: running.client.get("/readyz").status_code == 200)
        until(lambda: running.client.post("/v1/encodings", content=photograph(), headers=PNG).status_code == 201)


def test_photographs_of_clients_that_left_are_let_go_before_their_turn(segmenter, monkeypatch):
    """While the network works, others could come and leave, and each would leave its pixels in the queue."""
    gate = threading.Event()
    through, alive = segmenter.encode_prepared, []

    def waiting(*arguments):
        assert gate.wait(30)
        return through(*arguments)

    monkeypatch.setattr(segmenter, "encode_prepared", waiting)

    async def come_and_go() -> None:
        engine = Engine(segmenter, ServiceLimits(), Metrics(), batch=1)
        through_batches = engine._batches.__call__

        async def noting(place):
            alive.append(place)
            return await through_batches(place)

        engine._batches = noting
        try:
            first = asyncio.create_task(engine.encode(photograph()))
            later = [asyncio.create_task(engine.encode(photograph(seed))) for seed in (1, 2)]
            while len(alive) < 2:  # the third waits for a place in memory, or is there too
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            for task in later:
                task.cancel()
            await asyncio.gather(*later, return_exceptions=True)
            assert sum(place.photograph is not None for place in alive) == 1
            gate.set()
            assert (await first).sizes.image == (45, 60)
        finally:
            gate.set()
            engine.close()

    asyncio.run(come_and_go())


def test_a_request_of_two_lengths_is_refused_and_its_connection_closed(segmenter):
    smuggled = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
    head = b"POST /v1/encodings HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n"
    with serving(segmenter) as running:
        request = head % (5 + len(smuggled)) + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled
        with running.raw(request) as connection:
            answer = b""
            while data := connection.recv(4096):  # to the end: the connection is closed
                answer += data
        assert answer.startswith(b"HTTP/1.1 400") and answer.count(b"HTTP/1.1") == 1
        with running.raw(head % 5 + b"Content-Length: 6\r\n\r\nabcdef") as connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_more_connections_than_allowed_are_closed_at_once(segmenter):
    """Without a bound, the files that a process may have run out, and every attempt to accept one more is logged."""
    with serving(segmenter, limits=ServiceLimits(connections=3)) as running:
        first = [running.raw(b"") for _ in range(3)]
        with running.raw(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n") as fourth, pytest.raises(ConnectionError):
            if fourth.recv(100) == b"":
                raise ConnectionError
        for connection in first:
            connection.close()

        def answers() -> bool:
            try:
                return running.client.get("/healthz").status_code == 200
            except httpx.TransportError:
                return False

        until(answers)


def test_an_answer_tells_a_question_that_fails_and_the_next_one_is_answered(segmenter, monkeypatch):
    with serving(segmenter) as running:
        name = running.encode()
        with monkeypatch.context() as patch:
            patch.setattr(segmenter, "winners", lambda *_: 1 / 0)
            refused(running.ask(name), 500, "log")
        assert running.metric("waiting_questions") == 0
        assert running.ask(name).status_code == 200
