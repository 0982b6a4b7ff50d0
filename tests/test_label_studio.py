"""The service as Label Studio's ML backend: requests as Label Studio sends them, and a Label Studio that has images."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import httpx
import numpy as np
import pytest

import opensan
from opensan.errors import UserError
from opensan.files import ASSETS
from opensan.outputs.brush import brush_rle
from opensan.segmenters.san import SanSegmenter
from opensan.serve import ServiceLimits
from opensan.serve.task_images import TaskImages
from opensan.vocabulary import Vocabulary

from .test_serve import photograph, refused, serving

KEY = "0123456789abcdef0123456789abcdef01234567"

BRUSH = """<View>
  <!-- our streets -->
  <Image name="picture" value="$image" zoom="true"/>
  <BrushLabels name="areas" toName="picture">
    <Label value="road" background="#808080"/><Label value="Car" alias="car-1" predicted_values="car, automobile"/>
    <Label value="sky"/>
  </BrushLabels>
</View>"""
ALL = BRUSH.replace(
    "</View>",
    '<PolygonLabels name="shapes" toName="picture"><Label value="road"/><Label value="tree"/></PolygonLabels>'
    '<KeyPointLabels name="points" toName="picture"><Label value="road"/><Label value="sky"/></KeyPointLabels></View>',
)


class LabelStudio:
    """Serves files to who has the key, as Label Studio does, and lists what it was asked for."""

    def __init__(self):
        self.asked = []
        self.elsewhere = "http://127.0.0.1:1/secret.png"
        studio = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                studio.asked.append((self.path, self.headers["Authorization"]))
                studio.answer(self)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                studio.asked.append((self.path, body))
                say(self, 200, json.dumps({"access": "short-lived"}).encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, request):
        path, _, query = request.path.partition("?")
        if request.headers["Authorization"] not in (f"Token {KEY}", "Bearer short-lived"):
            return say(request, 401, b"{}")
        if path == "/data/away.png":
            return say(request, 302, b"", Location=self.elsewhere)
        if path == "/tasks/7/resolve/":
            return say(request, 303, b"", Location="/data/upload/1/street.png")
        if path == "/data/huge.png":
            return say(request, 200, bytes(3000))
        if path == "/data/page.html":
            return say(request, 200, b"<html>no image</html>")
        known = path == "/data/upload/1/street.png" or (path, query) == ("/data/local-files/", "d=a%20b/street.png")
        return say(request, 200, photograph()) if known else say(request, 404, b"")


def say(request, status, body, **headers):
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


@pytest.fixture(scope="module")
def studio():
    studio = LabelStudio()
    yield studio
    studio.server.shutdown()
    studio.server.server_close()


@pytest.fixture(scope="module")
def segmenter(small_model) -> SanSegmenter:
    """With random weights, of which "no object" would be the answer everywhere."""
    segmenter = SanSegmenter(small_model, text_cache=False)
    segmenter.has_no_object = False
    return segmenter


@pytest.fixture(scope="module")
def service(segmenter, studio):
    with serving(segmenter, label_studio=TaskImages(studio.url, KEY)) as running:
        yield running


def asked(*addresses, config=BRUSH, **more):
    """A request of Label Studio: label_studio/ml/api_connector.py, `make_predictions`."""
    tasks = [
        {"id": number, "data": {"image": address}, "meta": {}, "annotations": [], "predictions": [], "project": 1}
        for number, address in enumerate(addresses, 1)
    ]
    params = {"login": None, "password": None, "context": None}
    return {
        "tasks": tasks,
        "model_version": "",
        "project": "1.1700000000",
        "label_config": config,
        "params": params,
    } | more


def predict(service, *addresses, **more):
    return service.client.post("/predict", json=asked(*addresses, **more))


def data_uri(image=None):
    return f"data:image/png;base64,{base64.b64encode(image or photograph()).decode()}"


def expected(segmenter, words):
    entries = [{"name": name, "text": texts[0], "synonyms": texts[1:]} for name, texts in words.items()]
    return segmenter.segment(photograph(), Vocabulary.parse(entries))


def test_health_setup_versions_and_webhook(service, segmenter, studio):
    for path in ("/health", "/"):
        answer = service.client.get(path)
        assert answer.status_code == 200 and answer.json()["status"] == "UP"
    version = str(segmenter.identity)
    project = {"project": "1.1700000000", "schema": BRUSH, "hostname": "http://elsewhere", "access_token": "theirs"}
    assert service.client.post("/setup", json=project).json() == {"model_version": version}
    assert service.client.get("/versions").json() == {"versions": [version]}
    event = {"action": "ANNOTATION_CREATED", "annotation": {"result": [0] * 600_000}}  # more than other bodies may have
    assert service.client.post("/webhook", json=event).status_code == 200
    assert not studio.asked, "it went to the host that a request named"


def test_brushes_are_the_labels_of_the_segmenter(service, segmenter):
    """Whichever way the image comes; Label Studio's own reader decodes the masks where it is installed."""
    truth = expected(segmenter, {"road": ["road"], "Car": ["Car", "automobile"], "sky": ["sky"]})
    shown = ["road", "car-1", "sky"]
    for address in (
        data_uri(),
        "/data/upload/1/street.png",
        "/data/local-files/?d=a%20b/street.png",
        "/data/local-files/?d=a b/street.png",
        "/tasks/7/resolve/",
    ):
        answer = predict(service, address)
        assert answer.status_code == 200, answer.text
        [prediction] = answer.json()["results"]
        assert prediction["model_version"] == answer.json()["model_version"] == str(segmenter.identity)
        assert {region["value"]["brushlabels"][0] for region in prediction["result"]} == {
            shown[label] for label in np.unique(truth.labels[truth.labels >= 0])
        }
        for region in prediction["result"]:
            assert (region["from_name"], region["to_name"], region["type"]) == ("areas", "picture", "brushlabels")
            assert (region["original_width"], region["original_height"]) == (60, 45)
            mask = truth.labels == shown.index(region["value"]["brushlabels"][0])
            assert region["value"]["rle"] == brush_rle(mask)
            assert region["score"] == pytest.approx(truth.confidence[mask].mean(), abs=1e-5)
        scores = [region["score"] for region in prediction["result"]]
        assert prediction["score"] == pytest.approx(np.mean(scores), abs=1e-5)


def test_label_studios_own_reader(service, segmenter):
    brush = pytest.importorskip("label_studio_sdk.converter.brush")
    interface = pytest.importorskip("label_studio_sdk.label_interface").LabelInterface(ALL)
    [prediction] = predict(service, "/data/upload/1/street.png", config=ALL).json()["results"]
    assert {region["type"] for region in prediction["result"]} == {"brushlabels", "polygonlabels", "keypointlabels"}
    assert not interface.validate_prediction(prediction, return_errors=True)
    rebuilt = np.full((45, 60), -1)
    for region in prediction["result"]:
        if region["type"] == "brushlabels":
            values = np.array(brush.decode_rle(region["value"]["rle"])).reshape(45, 60, 4)
            rebuilt[values[..., 3] > 0] = ["road", "car-1", "sky"].index(region["value"]["brushlabels"][0])
    truth = expected(segmenter, {"road": ["road"], "Car": ["Car", "automobile"], "sky": ["sky"]})
    np.testing.assert_array_equal(rebuilt, truth.labels)


def test_polygons_and_key_points_lie_in_their_regions(service, segmenter):
    [prediction] = predict(service, data_uri(), config=ALL).json()["results"]
    ids = [region["id"] for region in prediction["result"]]
    assert len(set(ids)) == len(ids)
    shapes = expected(segmenter, {"road": ["road"], "tree": ["tree"]})
    covered = np.zeros((45, 60), dtype=bool)
    for region in prediction["result"]:
        if region["type"] == "polygonlabels":
            points = np.array(region["value"]["points"])
            assert len(points) >= 3 and points.min() >= 0 and points.max() <= 100 and region["value"]["closed"]
            word = shapes.names.index(region["value"]["polygonlabels"][0])
            left, top = (points.min(axis=0) / 100 * (60, 45)).round().astype(int)
            right, bottom = (points.max(axis=0) / 100 * (60, 45)).round().astype(int)
            assert (shapes.labels[top:bottom, left:right] == word).any()
            covered[top:bottom, left:right] = True
    assert covered[shapes.labels >= 0].mean() > 0.8
    points = expected(segmenter, {"road": ["road"], "sky": ["sky"]})
    placed = [region for region in prediction["result"] if region["type"] == "keypointlabels"]
    assert placed
    for region in placed:
        column, row = int(region["value"]["x"] * 0.6), int(region["value"]["y"] * 0.45)
        assert points.names[points.labels[row, column]] == region["value"]["keypointlabels"][0]


def test_pixels_that_no_label_deserves_stay_free():
    """A project that knows bricks alone: without the rest, all of the picture would be brick."""
    tiny = opensan.load("tiny", text_cache=False)
    scene = (ASSETS / "scenes" / "playground.png").read_bytes()
    labels = '<BrushLabels name="b" toName="a"><Label value="brick"/></BrushLabels>'
    config = f'<View><Image name="a" value="$image"/>{labels}</View>'
    with serving(tiny, label_studio=TaskImages("http://127.0.0.1:1")) as service:
        [prediction] = predict(service, data_uri(scene), config=config).json()["results"]
    truth = tiny.segment(scene, "brick", rest=True)
    assert 0 < truth.areas["brick"] < 0.9
    [region] = prediction["result"]
    assert region["value"]["rle"] == brush_rle(truth["brick"])


def test_addresses_that_are_not_read(service, studio):
    """Neither another host nor a path without files, by whatever trick; nothing is asked for, and no file is opened."""
    host = studio.url.removeprefix("http://")
    studio.asked.clear()
    for address, told in (
        ("http://127.0.0.1:1/data/upload/1/street.png", "is not at"),
        ("http://169.254.169.254/latest/meta-data/", "is not at"),
        (f"https://{host}/data/upload/1/street.png", "is not at"),
        (f"http://{host}@127.0.0.1:1/data/x.png", "is not at"),
        (f"http://user:secret@{host}/data/upload/1/street.png", "is not at"),
        (f"http://{host}.example.org/data/x.png", "is no"),
        ("//127.0.0.1:1/data/upload/1/street.png", "is not at"),
        ("\\\\127.0.0.1:1\\data\\x.png", "is not at"),
        ("file:///etc/passwd", "is not at"),
        ("ftp://127.0.0.1/data/x.png", "is not at"),
        ("s3://bucket/street.png", "is not at"),
        ("street.png", "is not at"),
        ("http://[::1/data/x", "is no address"),
        ("/api/projects/", "is no file of Label Studio"),
        ("/user/logout", "is no file of Label Studio"),
        ("/data/../api/projects/", "is no file of Label Studio"),
        ("/data/%2e%2e/api/projects/", "is no file of Label Studio"),
        ("/data//../../api/x", "is no file of Label Studio"),
        ("data:text/html;base64,PGh0bWw+", "data:image/"),
        ("data:image/png;base64,####", "not base64"),
        ("data:image/png,abc", "data:image/"),
        ("", "address or a data URI"),
        (None, "address or a data URI"),
        ({"url": "x"}, "address or a data URI"),
    ):
        refused(predict(service, address), 422, "task 1", told)
    assert not studio.asked


def test_what_label_studio_does_not_give(service, studio, segmenter):
    for address, told in (
        ("/data/away.png", "is not at"),  # a redirect
        ("/data/missing.png", "answered 404"),
        ("/data/page.html", "image"),
    ):
        refused(predict(service, address), 422, "task 1", told)
    with serving(segmenter, label_studio=TaskImages(studio.url)) as without_key:
        refused(predict(without_key, "/data/upload/1/street.png"), 422, "401", "LABEL_STUDIO_API_KEY")
    limits = ServiceLimits(request_bytes=2000)
    with serving(segmenter, limits=limits, label_studio=TaskImages(studio.url, KEY, limits)) as small:
        refused(predict(small, "/data/huge.png"), 413, "longer than 2,000 bytes")
    with serving(segmenter, label_studio=TaskImages("http://127.0.0.1:1", KEY)) as nobody:
        refused(predict(nobody, "/data/upload/1/street.png"), 422, "Label Studio does not give")


def test_a_personal_access_token_is_exchanged(segmenter, studio):
    studio.asked.clear()
    with serving(segmenter, label_studio=TaskImages(studio.url, "eyJhbGciOi.x.y")) as service:
        for _ in range(2):
            assert predict(service, "/data/upload/1/street.png").status_code == 200
    assert [asks for asks in studio.asked if asks[0] != "/data/upload/1/street.png"] == [
        ("/api/token/refresh", {"refresh": "eyJhbGciOi.x.y"})
    ]
    assert studio.asked[-1][1] == "Bearer short-lived"


def test_one_task_of_several_that_cannot_be_read(service):
    answer = predict(service, data_uri(), "/data/missing.png", data_uri(b"no image"))
    assert answer.status_code == 200
    good, missing, broken = answer.json()["results"]
    assert good["result"]
    assert missing.keys() == broken.keys() == {"error"}  # a prediction without regions would be kept for good
    assert "task 2" in missing["error"] and "404" in missing["error"] and "task 3" in broken["error"]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (None, "missing"),
        ("<View>", "not XML"),
        ('<!DOCTYPE x [<!ENTITY a "aaaa">]><View>&a;</View>', "DOCTYPE"),
        ("<View/>", "none of BrushLabels"),
        ('<View><Image name="a" value="$image"/><RectangleLabels name="b" toName="a"/></View>', "none of BrushLabels"),
        (BRUSH.replace('toName="picture"', 'toName="text"'), "toName"),
        (BRUSH.replace('value="$image"', 'value="http://elsewhere/x.png"'), "$image"),
        ('<View><Image name="a" value="$image"/><BrushLabels name="b" toName="a"/></View>', "has no <Label"),
        (BRUSH.replace('"sky"', '"road"'), "road"),
        (BRUSH.replace('"sky"', f'"{"x" * 30_000}"'), "characters"),
        (BRUSH.replace("$image", "$photo"), "photo"),
    ],
)
def test_configurations_that_cannot_be_answered(service, config, told):
    refused(predict(service, data_uri(), config=config), 422, told)


def test_requests_that_are_none(service):
    post = service.client.post
    refused(post("/predict", content=b"<xml/>"), 400, "not JSON")
    refused(post("/predict", content=b"[" * 100_000), 400, "not JSON")
    refused(post("/predict", json=[]), 422, "an object")
    refused(post("/predict", json=asked(tasks="all")), 422, "tasks")
    refused(post("/predict", json=asked(tasks=[1])), 422, "tasks")
    refused(post("/predict", json=asked(tasks=[{"id": 1}])), 422, "task 1", "data is missing")
    refused(post("/predict", json=asked(*["/data/x.png"] * 129)), 422, "limit of 128")
    refused(post("/setup", json={"schema": "<View/>"}), 422, "none of BrushLabels")
    assert post("/predict", json=asked()).json()["results"] == []


def test_the_token_comes_as_a_password(segmenter, studio):
    """Label Studio knows basic authentication alone."""
    images = TaskImages(studio.url, KEY)
    with serving(segmenter, token="letmein", label_studio=images) as service:
        assert service.client.get("/health", auth=("anybody", "letmein")).status_code == 200
        assert service.client.get("/health", headers={"Authorization": "Bearer letmein"}).status_code == 200
        for auth in (None, ("letmein", ""), ("anybody", "wrong")):
            refused(service.client.get("/health", auth=auth), 401)
            refused(service.client.post("/predict", json=asked(data_uri()), auth=auth), 401)
        refused(service.client.get("/health", headers={"Authorization": "Basic ####"}), 401)
    with serving(segmenter, token="letmein") as service:
        refused(service.client.get("/v1/info", auth=("anybody", "letmein")), 401)


def test_only_when_asked_for(segmenter):
    with serving(segmenter) as service:
        for path in ("/health", "/versions", "/"):
            assert service.client.get(path).status_code == 404
        assert predict(service, data_uri()).status_code == 404


def test_too_many_at_a_time(segmenter, studio):
    limits = ServiceLimits(waiting=1)
    with serving(segmenter, limits=limits, label_studio=TaskImages(studio.url, KEY, limits)) as service:
        codes = []

        def ask():
            with httpx.Client(base_url=service.url, timeout=60) as client:
                codes.append(client.post("/predict", json=asked(*[data_uri()] * 12)).status_code)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert set(codes) <= {200, 429} and 429 in codes and 200 in codes


@pytest.mark.parametrize(
    "host", ["localhost:8080", "ftp://host", "http://", "http://a@b", "http://h?x=1", "http://h:port"]
)
def test_a_host_that_is_none(host):
    with pytest.raises(UserError, match="such as http://localhost:8080"):
        TaskImages(host)


def test_a_label_studio_below_a_path():
    images = TaskImages("http://host/studio")
    for address in (
        "/data/x.png",
        "/studio/data/x.png",
        "http://host/studio/data/x.png",
        "http://host:80/studio/data/x.png",
    ):
        assert images._allowed(address).endswith("/studio/data/x.png")
    from opensan.serve.limits import Problem

    with pytest.raises(Problem):
        images._allowed("http://host/data/x.png")
    assert images._allowed("/data/" + "ä b.png").endswith("/studio/data/" + quote("ä b.png"))
