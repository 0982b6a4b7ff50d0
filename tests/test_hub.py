"""Models from a hub: a real client process against a small hub on 127.0.0.1 that can fail in every way."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from queue import Empty, Queue

import pytest
import torch

from opensan.checkpoints import preset_config, save_folder
from opensan.checkpoints.official import to_official

from .hubs import COMMIT, Hub, cut, fail, hang_up, stay_silent

OFFICIAL = "Mendel192/san"

CLIENT = """
import json, sys, traceback
import opensan
for line in sys.stdin:
    try:
        answer = {"loaded": opensan.load(json.loads(line), text_cache=False).identity.name}
    except (ValueError, ConnectionError) as error:
        answer = {"kind": type(error).__name__, "message": str(error), "chained": not error.__suppress_context__}
    except BaseException:
        answer = {"kind": "traceback", "message": traceback.format_exc()}
    print(json.dumps(answer), flush=True)
"""


class Client:
    """A process that loads models, one after another; huggingface_hub reads its environment once, at import."""

    def __init__(self, cache, endpoint, **environment):
        settings = {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HOME": str(cache / "home")}
        settings |= {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        inherited |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        self.cache = cache
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=inherited | settings | environment,
        )
        self.answers = Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self.answers.put(json.loads(line))

    def load(self, source):
        self.process.stdin.write(json.dumps(source) + "\n")
        self.process.stdin.flush()
        try:
            return self.answers.get(timeout=120)  # the first answer includes importing torch on a busy machine
        except Empty:
            raise AssertionError(f"no answer for {source}: does it try again and again?") from None

    def refused(self, source) -> str:
        """The HubError's message: one line that says what works."""
        answer = self.load(source)
        assert answer.get("kind") == "HubError", answer
        message = answer["message"]
        assert "\n" not in message and not answer["chained"]
        assert message.startswith(f"{source}: tried http://127.0.0.1:")
        assert str(self.cache) in message and "--model PATH" in message and "--model tiny" in message
        return message

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def online(port, tmp_path_factory):
    client = Client(tmp_path_factory.mktemp("hub-cache"), f"http://127.0.0.1:{port}")
    yield client
    client.close()


@pytest.fixture
def client(online):
    """The client, with an empty cache."""
    shutil.rmtree(online.cache)
    online.cache.mkdir()
    return online


@pytest.fixture
def hub(port):
    hub = Hub(port)
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def model_files(small_model, tmp_path_factory):
    folder = save_folder(small_model, tmp_path_factory.mktemp("model"))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def publish(hub, repository, files):
    for name, content in files.items():
        hub.put(repository, name, content)


def test_a_model_is_fetched_once_and_then_works_without_the_hub(client, hub, model_files):
    publish(hub, "lab/small", model_files)
    first = client.load("lab/small")
    assert first["loaded"] == "small"
    assert sorted(path for method, path in hub.requests if method == "GET") == [
        f"/lab/small/resolve/{COMMIT}/model.safetensors",  # of the same commit, whatever is pushed meanwhile
        "/lab/small/resolve/main/config.json",
    ]
    hub.requests.clear()
    assert client.load("lab/small") == first
    assert not [path for method, path in hub.requests if method == "GET"], "fetched again"

    publish(hub, "lab/small", dict.fromkeys(model_files, fail(500)))
    assert client.load("lab/small") == first
    publish(hub, "lab/small", dict.fromkeys(model_files, stay_silent))
    assert client.load("lab/small") == first
    hub.stop()
    assert client.load("lab/small") == first


def test_a_hub_that_does_not_give_the_file(client, hub, model_files):
    """One line for every way to fail, after one question: asking again for minutes would look like hanging."""
    hub.put(OFFICIAL, "README.md", b"")
    file = "san_vit_b_16.pth"
    for failure, reason in (
        (None, "no such file"),
        (fail(404), "404"),
        (fail(404, "RepoNotFound"), "no such repository"),
        (fail(401), "the hub answered 401"),
        (fail(401, "RepoNotFound"), "no such repository, or it is private"),
        (fail(403, "GatedRepo"), "gated"),
        (fail(500), "the hub answered 500"),
        (fail(503), "the hub answered 503"),
        (hang_up, "broke off"),
        (stay_silent, "cannot be reached"),
    ):
        hub.put(OFFICIAL, file, failure)
        hub.requests.clear()
        message = client.refused("san-vit-b16")
        assert reason in message and file in message and OFFICIAL in message, message
        assert len(hub.requests) == 1, (reason, hub.requests)

    assert "no such repository" in client.refused("nobody/nothing")
    publish(hub, "lab/half", {"config.json": model_files["config.json"]})
    assert "model.safetensors" in client.refused("lab/half")


def test_nobody_listens(client, port):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    for source, file in (
        ("san-vit-b16", "san_vit_b_16.pth"),
        ("san-vit-l14", "san_vit_large_14.pth"),
        ("lab/small", "config.json"),
    ):
        message = client.refused(source)
        assert file in message and "cannot be reached" in message


def test_offline_by_the_environment(port, hub, model_files, tmp_path):
    """HF_HUB_OFFLINE asks nobody, and the message names the variable; what is cached works."""
    publish(hub, "lab/small", model_files)
    cached = tmp_path / "models--lab--small"
    snapshot = cached / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name, content in model_files.items():
        (snapshot / name).write_bytes(content)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)

    client = Client(tmp_path, f"http://127.0.0.1:{port}", HF_HUB_OFFLINE="1")
    try:
        for source in ("san-vit-b16", "lab/other"):
            message = client.refused(source)
            assert "offline" in message and "HF_HUB_OFFLINE" in message
        assert client.load("lab/small")["loaded"] == "small"
        assert not hub.requests
    finally:
        client.close()


def test_a_preset_checks_what_it_was_given(client, hub, small_model, small_config):
    """The right name with another model's weights, and a file that is none."""
    wrong = io.BytesIO()
    torch.save({"model": to_official(small_model.state_dict(), small_config)}, wrong)
    hub.put(OFFICIAL, "san_vit_b_16.pth", wrong.getvalue())
    answer = client.load("san-vit-b16")
    assert answer["kind"] == "UserError" and "\n" not in answer["message"]
    assert "san_vit_b_16.pth: does not hold this model's weights: missing clip_rec_head." in answer["message"]

    hub.put(OFFICIAL, "san_vit_large_14.pth", b"<html>Please log in to this network</html>")
    answer = client.load("san-vit-l14")
    assert answer["kind"] == "UserError" and "not a readable PyTorch checkpoint" in answer["message"]


def test_a_transfer_that_breaks_off_leaves_nothing_behind(client, hub, model_files):
    """Half a file is no model; the next try gets the whole one."""
    publish(hub, "lab/small", model_files | {"model.safetensors": cut(model_files["model.safetensors"])})
    assert "broke off" in client.refused("lab/small")
    gets = [path for method, path in hub.requests if method == "GET" and path.endswith("model.safetensors")]
    assert len(gets) <= 6, "tried again without end"
    publish(hub, "lab/small", model_files)
    assert client.load("lab/small")["loaded"] == "small"


def test_a_name_that_is_no_hub_id(client, hub):
    for source in ("lab/..", "lab/-small-", "a" * 100 + "/b"):
        answer = client.load(source)
        assert answer["kind"] == "UserError" and "\n" not in answer["message"], answer
    assert not hub.requests


def test_a_pinned_revision(client, hub, model_files):
    publish(hub, "lab/small", model_files)
    assert client.load(f"lab/small@{COMMIT}")["loaded"] == "small"
    assert "no such commit" in client.refused("lab/small@never")
    assert "no such commit" in client.refused("lab/small@refs/pr/7")


def test_a_tokenizer_of_the_models_own_is_fetched_too(client, hub, model_files):
    """A model whose text tower is SigLIP's reads words by a file beside its weights."""
    config = preset_config("siglip-vit-b16").model_dump_json().encode()
    publish(hub, "lab/own", model_files | {"config.json": config})
    assert "tokenizer.json" in client.refused("lab/own")
    hub.put("lab/own", "tokenizer.json", b"{}")
    client.load("lab/own")  # the weights are another model's
    assert ("GET", f"/lab/own/resolve/{COMMIT}/tokenizer.json") in hub.requests
