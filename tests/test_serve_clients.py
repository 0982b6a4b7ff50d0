"""Which clients the HTTP service lets in, and what it makes of odd, foreign and vanishing ones."""

import gzip
import json
import logging
import re
import socket
import threading
import time

import httpx
import pytest

from opensan.segmenters.san import SanSegmenter
from opensan.serve import ServiceLimits, answers, engine
from tests.test_serve import PNG, WORDS, in_threads, photograph, refused, serving, until


@pytest.fixture(scope="module")
def segmenter(small_model) -> SanSegmenter:
    return SanSegmenter(small_model, text_cache=False)


@pytest.fixture(scope="module")
def service(segmenter):
    with serving(segmenter) as running:
        yield running


@pytest.fixture
def log():
    """What the service logs."""
    records: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        records.append(logging.Formatter().format(record))
        return True

    logger = logging.getLogger("uvicorn.error")
    logger.addFilter(note)  # a handler would be taken away when a service starts
    yield records
    logger.removeFilter(note)


def multipart(*fields: tuple[bytes, bytes], content_type: bytes = b"") -> dict:
    """A form of raw fields and a photograph, for httpx."""
    parts = [b'Content-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % field for field in fields]
    parts.append(b'Content-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n%s\r\n' % photograph())
    content = b"".join(b"--XX\r\n" + part for part in parts) + b"--XX--\r\n"
    return {
        "content": content,
        "headers": [(b"Content-Type", b"multipart/form-data; boundary=XX" + content_type)],
    }


def words_of(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [word["name"] for word in answer.json()["words"]]


# Tokens, names and origins


def test_no_spelling_of_a_path_gets_round_the_token(segmenter):
    with serving(segmenter, token="sesame") as running:
        paths = ["/metrics", "/metrics%0a", "/metrics%0A", "/metrics%0d%0a", "/metrics/", "//metrics", "/./metrics"]
        paths += ["/v1/info", "/v1/info%0a", "/%761/info", "/V1/info", "/docs", "/redoc", "/openapi.json", "/nothing"]
        paths += ["/static-offline-docs/swagger-ui.css", "/healthz%0a", "/healthz/../metrics", "/healthz/", "/"]
        for path in paths:
            with running.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()) as connection:
                assert connection.recv(100).startswith(b"HTTP/1.1 401"), path
        for path in ("/healthz", "/readyz"):
            assert running.client.get(path).status_code == 200
        right = {"Authorization": "Bearer sesame"}
        for path in ("/metrics", "/v1/info", "/docs", "/openapi.json"):
            assert running.client.get(path, headers=right).status_code == 200
        refused(running.client.get("/metrics%0a", headers=right), 404, "control character")


def test_health_and_readiness_answer_head(service):
    for path in ("/healthz", "/readyz"):
        answer = service.client.head(path)
        assert answer.status_code == 200 and answer.content == b""
    assert "head" not in service.client.get("/openapi.json").json()["paths"]["/healthz"]


def test_a_service_with_names_refuses_other_names(segmenter):
    with serving(segmenter, hosts=["San.example", "::1"]) as running:
        port = running.listener.getsockname()[1]
        for host in ("san.example", f"SAN.EXAMPLE:{port}", "[::1]:80", "[::1]"):
            assert running.client.get("/v1/info", headers={"Host": host}).status_code == 200, host
        for host in (f"127.0.0.1:{port}", "evil.example", "san.example.evil", "", "[::2]", "san.example@evil"):
            refused(running.client.get("/v1/info", headers={"Host": host}), 421, "san.example")
            refused(running.client.get("/docs", headers={"Host": host}), 421)
        assert running.client.get("/healthz", headers={"Host": "10.0.0.7"}).status_code == 200  # of an orchestrator


def test_the_page_answers_itself_and_programs_only(segmenter):
    """Another web page may not send photographs through the user's browser: they would push out the user's own."""
    with serving(segmenter, page=True) as running:
        host = running.url.removeprefix("http://")

        def status(method: str = "POST", path: str = "/v1/encodings", **headers: str) -> int:
            headers = {name.replace("_", "-"): value for name, value in headers.items()} | PNG
            return running.client.request(method, path, content=photograph(), headers=headers).status_code

        assert status() == 201
        assert status(Origin=f"http://{host}", Sec_Fetch_Site="same-origin") == 201
        assert status(Sec_Fetch_Site="none") == 201
        for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"https://{host}", f"http://{host}.evil"):
            assert status(Origin=origin) == 403, origin
        for site in ("cross-site", "same-site", "anything"):
            assert status(Sec_Fetch_Site=site) == 403
        assert status(Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate") == 403  # a form of another page
        assert status("DELETE", "/v1/encodings/x", Origin="http://evil.example") == 403
        assert status("GET", "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors") == 403
        assert status("GET", "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate") == 200  # a link to it
        assert status("GET", "/healthz", Origin="http://evil.example") == 200


# Bodies


def test_a_field_that_is_sent_several_times_is_a_list(service):
    def send(*fields: tuple[str, str]) -> httpx.Response:
        return service.client.post("/v1/segmentation", **multipart(*((a.encode(), b.encode()) for a, b in fields)))

    three = ["night sky", "brick", "green heart"]
    assert words_of(send(*(("words", word) for word in three))) == three
    assert words_of(send(("words", "night sky, brick"), ("words", "green heart"))) == three
    assert words_of(send(("words", '["night sky"]'), ("words", "brick,green heart"))) == three
    answer = send(("words", "sky"), ("background", "brick"), ("background", "grass"))
    assert answer.json()["vocabulary"]["background"] == ["brick", "grass"]
    many = send(("words", "sky"), ("templates", "a photo of {}, near"), ("templates", "{}"))
    assert many.json()["vocabulary"]["templates"] == ["a photo of {}, near", "{}"]
    refused(send(("words", "sky"), ("words", "[3]")), 422, "words")
    refused(send(("words", "sky"), ("words", "sky")), 422, "sky")
    refused(send(("words", "sky"), ("image", "x")), 422, "image")
    refused(send(*[("words", "sky")] * 600), 400, "Too many fields")


def test_text_lists_words_by_the_one_rule(service):
    """Of a form, and of a JSON body whose words are text."""
    form = lambda text: service.client.post("/v1/segmentation", **multipart((b"words", text.encode())))  # noqa: E731
    encoded = service.client.post("/v1/encodings", files={"image": photograph()}).json()["id"]
    body = lambda text: service.client.post(  # noqa: E731
        f"/v1/encodings/{encoded}/segmentation", json={"words": text}
    )
    for ask in (form, body):
        for text in (
            '["night sky", "brick"]',
            "['night sky', 'brick']",
            "night sky; brick",
            "night sky、brick",
            "night sky\nbrick",
        ):
            assert words_of(ask(text)) == ["night sky", "brick"], text
        refused(ask("[night sky, brick]"), 422, "begins like a list")
        refused(ask("a, b; c"), 422, "commas and semicolons")
        refused(ask("words.txt"), 422, "looks like a file")
        refused(ask('{"words": ["a"]}'), 422, "fields of their own")


def test_forms_of_any_charset_are_read_or_refused(service, log):
    def send(words: bytes, charset: bytes = b"") -> httpx.Response:
        return service.client.post("/v1/segmentation", **multipart((b"words", words), content_type=charset))

    assert words_of(send("café, Straße".encode())) == ["café", "Straße"]
    assert words_of(send("café".encode("latin-1"), b"; charset=ISO-8859-1")) == ["café"]
    assert words_of(send("café".encode("utf-16"), b"; charset=utf-16")) == ["café"]
    assert words_of(send(b"road", b'; charset="US-ASCII"')) == ["road"]
    refused(send("café".encode("latin-1")), 422, "words", "utf-8")
    for charset in (b"idna", b"undefined", b"hex", b"rot13", b"utf-7", b"unicode_escape", b"no", b"\xff", b"a" * 5000):
        refused(send(b"road", b"; charset=" + charset), 415, "charset")
    refused(send(b"road", b"; charset=utf-8; charset=idna"), 415, "charset")
    for header in (b"multipart/form-data", b"multipart/form-data; boundary=", b"multipart/form-data; charset"):
        answer = service.client.post("/v1/segmentation", content=b"--XX", headers=[(b"Content-Type", header)])
        refused(answer, 415 if header.endswith(b"charset") else 400)
    refused(service.client.post("/v1/segmentation", **multipart((b"wor\xff", b"road"))), 422, "unknown field")
    assert not log


def test_an_encoded_body_is_refused(service):
    name = service.encode()
    for path, media_type in (
        ("/v1/encodings", "image/png"),
        (f"/v1/encodings/{name}/segmentation", "application/json"),
    ):
        for coding in ("gzip", "br", "deflate", "identity, gzip"):
            headers = {"Content-Type": media_type, "Content-Encoding": coding}
            answer = service.client.post(path, content=gzip.compress(b"{}"), headers=headers)
            refused(answer, 415, "Content-Encoding")
            assert answer.headers["Accept-Encoding"] == "identity"
    kept = service.client.post("/v1/encodings", content=photograph(), headers={**PNG, "Content-Encoding": "identity"})
    assert kept.status_code == 201


@pytest.mark.parametrize(
    ("head", "start"),
    [
        (b"POST /v1/encodings HTTP/1.1\r\nContent-Type: image/png\r\n", b"\x89PNG"),
        (b"POST /v1/segmentation HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=XX\r\n", b"--XX\r\nContent-"),
        (b"POST /v1/encodings/x/segmentation HTTP/1.1\r\nContent-Type: application/json\r\n", b'{"words'),
        (b"POST /v1/encodings/x/point HTTP/1.1\r\nContent-Type: application/json\r\n", b'{"words'),
    ],
)
@pytest.mark.parametrize("leave", ["close", "half-close", "reset"])
def test_who_leaves_in_the_middle_of_an_upload_is_no_fault_of_the_service(segmenter, log, head, start, leave):
    with serving(segmenter) as running:
        connection = running.raw(head + b"Host: x\r\nContent-Length: 9000\r\n\r\n" + start)
        until(lambda: not running.app.gate.empty())
        if leave == "half-close":
            connection.shutdown(socket.SHUT_WR)
        elif leave == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if leave != "half-close":
            connection.close()
        until(running.app.gate.empty)
        connection.close()
        page = running.client.get("/metrics").text
        assert 'code="499"' in page and 'code="5' not in page
        assert running.metric("waiting_images") == 0
        assert running.ask(running.encode()).status_code == 200
    assert not log


def test_who_closes_half_while_waiting_is_no_fault_of_the_service(segmenter, held, log):
    data = photograph()
    head = b"POST /v1/encodings HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"
    with serving(segmenter) as running:
        with running.raw(head % len(data) + data) as connection:
            until(lambda: running.metric("waiting_images") == 1)
            connection.shutdown(socket.SHUT_WR)
            until(lambda: running.metric("waiting_images") == 0)
        held.set()
        assert 'code="5' not in running.client.get("/metrics").text
        assert running.ask(running.encode()).status_code == 200
    assert not log


# Faults of the service, and what they are not


def test_a_fault_of_ours_is_a_logged_500_and_a_mistake_of_the_client_is_not(segmenter, monkeypatch, log):
    with serving(segmenter) as running:
        name = running.encode()
        refused(running.ask(name, words=["road"], templates=["no braces"]), 422, "no braces")
        assert not log
        with monkeypatch.context() as patch:
            message = "operands could not be broadcast together"
            patch.setattr(answers, "answer", lambda *_, **__: (_ for _ in ()).throw(ValueError(message)))
            refused(running.ask(name), 500, "log")
        until(lambda: len(log) == 1)  # logged after the answer
        assert "operands could not be broadcast" in log[0]
        with monkeypatch.context() as patch:
            patch.setattr(engine, "decode", lambda *_: [].index(3))
            refused(running.client.post("/v1/encodings", content=photograph(), headers=PNG), 500, "log")
        with monkeypatch.context() as patch:
            patch.setattr("opensan.serve.schemas.Vocabulary.parse", lambda *_, **__: int("x"))
            refused(running.ask(name), 500, "log")
        until(lambda: len(log) == 3)
        assert all("Traceback" in entry for entry in log)
        assert running.metric('requests_total{code="500",method="POST",route="/v1/encodings"}') == 1


def test_decoded_photographs_that_wait_are_bounded(segmenter, held, monkeypatch):
    """Decoded, a photograph is many times as large as its file: those beyond the next batches wait as files."""
    decoded = []
    through = engine.decode

    def counting(data, limits):
        decoded.append(len(data))
        return through(data, limits)

    monkeypatch.setattr(engine, "decode", counting)
    with serving(segmenter, limits=ServiceLimits(waiting=12), batch=2) as running:
        threads, names = in_threads(lambda seed: running.encode(photograph(seed)), 12)
        until(lambda: running.metric("waiting_images") == 12)
        until(lambda: len(decoded) >= 4)
        time.sleep(0.3)
        assert len(decoded) == 4  # two batches of two: one in the network, one next
        held.set()
        for thread in threads:
            thread.join()
        assert len(decoded) == 12 and all(names)


# Answers


def test_large_answers_are_compressed_off_the_event_loop(segmenter, monkeypatch):
    where = []
    through = gzip.compress

    def noting(*arguments):
        where.append(threading.current_thread().name)
        return through(*arguments)

    monkeypatch.setattr(answers.gzip, "compress", noting)
    with serving(segmenter) as running:
        name = running.encode(photograph(size=(200, 150)))

        def ask(form: str, coding: str) -> httpx.Response:
            return running.client.post(
                f"/v1/encodings/{name}/segmentation?format={form}",
                json={"words": WORDS},
                headers={"Accept-Encoding": coding},
            )

        plain = ask("map", "identity")
        assert "Content-Encoding" not in plain.headers and not where
        for coding in ("gzip", "br, *;q=0.1", "deflate;q=1, gzip;q=0.5"):
            packed = ask("map", coding)
            assert packed.headers["Content-Encoding"] == "gzip" and packed.headers["Vary"] == "Accept-Encoding"
            assert packed.content == plain.content  # httpx unpacks it
        assert len(where) == 3 and all(thread.startswith("label") for thread in where)
        for form, coding in (("map", "gzip;q=0, *"), ("labels", "gzip"), ("overlay", "gzip")):
            assert "Content-Encoding" not in ask(form, coding).headers
        assert json.loads(ask("json", "gzip").content)["words"]


def test_the_pages_of_the_api_need_no_network(service):
    for path in ("/docs", "/redoc"):
        page = service.client.get(path).text
        assert not re.search(r"""(src|href|url)\s*[=:(]\s*["']?(https?:)?//""", page), path
        assets = re.findall(r"""(?:src|href)=["'](/[^"']+)""", page)
        assert assets
        for asset in assets:
            assert service.client.get(asset).status_code == 200, asset
