"""A model goes to a hub and comes back: the real client against a small hub on 127.0.0.1."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard

import opensan
from opensan.assemble.calibration import Calibration
from opensan.checkpoints import save_folder
from opensan.checkpoints.card import MARK
from opensan.checkpoints.push import push
from opensan.cli import main
from opensan.errors import HubError, UserError

from .hubs import TOKEN, fail, hang_up, hub_of_this_process
from .test_recipe import recipe_file, run, squares

__all__ = ["recipe_file", "squares"]

WORDS = ["red", "green", "blue"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = hub_of_this_process(tmp_path / "hub-cache", monkeypatch)
    yield hub
    hub.stop()


@pytest.fixture
def folder(tmp_path, small_model):
    return save_folder(small_model, tmp_path / "small")


def photograph():
    return np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def card_of(hub, repository):
    return hub.holds(repository)["README.md"].decode()


def test_a_model_comes_back_as_it_went(hub, folder):
    segmenter = opensan.load(folder, text_cache=False)
    pushed = segmenter.push_to_hub("lab/small", license="mit")
    assert pushed.page == f"{hub.url}/lab/small"
    assert set(hub.holds("lab/small")) == {"config.json", "model.safetensors", "README.md"}
    for name in ("config.json", "model.safetensors"):
        assert hub.holds("lab/small")[name] == (folder / name).read_bytes()
    expected = segmenter.segment(photograph(), WORDS).labels
    for source, revision in (("lab/small", None), (f"lab/small@{pushed.commit}", None), ("lab/small", pushed.commit)):
        again = opensan.Segmenter.from_pretrained(source, revision=revision, text_cache=False)
        assert again.identity == segmenter.identity
        np.testing.assert_array_equal(again.segment(photograph(), WORDS).labels, expected)


def test_the_card_tells_the_training_and_nothing_else(tmp_path, hub, recipe_file, capsys):
    """Every figure on it is in the run's records; of the machine it tells nothing."""
    out = tmp_path / "run"
    assert run("train", recipe_file) == 0
    assert (
        run("eval", "--data", tmp_path / "squares", "--split", "val", "--model", out / "model", "--out", tmp_path / "r")
        == 0
    )
    capsys.readouterr()
    assert run("push", out / "model", "lab/squares", "--evaluation", tmp_path / "r" / "squares", "--private") == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[0] == f"{hub.url}/lab/squares" and "--model lab/squares@" in told.out
    assert told.err == "" and hub.private["lab/squares"]
    text = card_of(hub, "lab/squares")
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("opensan", "image-segmentation", None)
    assert data.datasets is None  # a name of the hub's, which this set has not
    measured = json.loads((tmp_path / "r" / "squares" / "metrics.json").read_text())["metrics"]["miou"]
    figures = [result.metric_value for result in data.eval_results if result.metric_type == "mean_iou"]
    assert len(figures) == 2 and figures[1] == pytest.approx(measured, abs=1e-6)
    record = json.loads((out / "model" / "training.json").read_text())
    assert figures[0] == pytest.approx(record["validation"]["figures"]["miou"], abs=1e-6)
    assert f"these are the weights after step {record['step']}" in text
    assert "| squares | train | 8 | 3 | 1.0 |" in text and "`red`, `green`, `blue`" in text
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["loop"]["steps"] == 6 and settings["points"]["count"] == 64
    assert '--words "red, green, blue" --model lab/squares' in text
    assert str(tmp_path) not in text and "out:" not in text


def test_without_records_the_card_says_so(hub, folder):
    (folder / "training.json").write_text(
        json.dumps({"model": "other-000000000000"})
    )  # of weights that lay here before
    push(folder, "lab/small")
    text = card_of(hub, "lab/small")
    assert "No record of a training" in text and "no evaluation given" in text
    assert ModelCard(text).data.eval_results is None


def test_a_card_that_somebody_wrote_stays(hub, folder):
    push(folder, "lab/small")
    hub.edit("lab/small", "README.md", b"# Ours\n")
    push(folder, "lab/small")
    assert card_of(hub, "lab/small") == "# Ours\n"
    hub.edit("lab/small", "README.md", f"---\n---\n{MARK}\nold".encode())
    push(folder, "lab/small")
    assert "# small" in card_of(hub, "lab/small")
    (folder / "README.md").write_text("# Mine\n")
    push(folder, "lab/small")
    assert card_of(hub, "lab/small") == "# Mine\n"


def test_a_push_of_the_same_is_quiet_and_changes_nothing(hub, folder, capsys):
    push(folder, "lab/small")
    capsys.readouterr()
    push(folder, "lab/small")
    assert len(hub.commits) == 1 and capsys.readouterr().err == ""


def test_a_calibration_goes_along(hub, folder):
    segmenter = opensan.load(folder, text_cache=False)
    facts = {"words": tuple(WORDS), "data": "squares", "images": 3, "pixels": 9, "ece_before": 0.2, "ece_after": 0.1}
    calibration = Calibration(str(segmenter.identity), 0.5, **facts)
    calibration.save(folder / "calibration.json")
    push(folder, "lab/small")
    assert opensan.load("lab/small", text_cache=False).calibration == calibration
    replace(calibration, model="other-000000000000").save(folder / "calibration.json")
    refused(UserError, folder, "lab/small", "calibration of another model")


def refused(kind, source, repository, *parts, **options):
    with pytest.raises(kind) as told:
        push(source, repository, **options)
    message = str(told.value)
    assert "\n" not in message and TOKEN not in message
    for part in parts:
        assert part in message, message


def test_what_is_refused(hub, folder, tmp_path, monkeypatch):
    for name in ("small", "lab/small/x", "lab/..", "lab/-x", "lab/small@main", "", "lab/sm all"):
        refused(UserError, folder, name, "is not a hub id")
    (tmp_path / "empty").mkdir()
    refused(UserError, tmp_path / "empty", "lab/x", "config.json: does not exist")
    refused(UserError, tmp_path / "nothing", "lab/x", "no model")
    (tmp_path / "run").mkdir()
    save_folder(_model(folder), tmp_path / "run" / "model")
    refused(UserError, tmp_path / "run", "lab/x", "is the folder of a training", str(tmp_path / "run" / "model"))
    refused(HubError, folder, "somebody/small", "403", "somebody else's")
    refused(UserError, folder, "lab/x", "metrics.json", evaluations=[tmp_path])
    push(folder, "lab/open")
    refused(UserError, folder, "lab/open", "everybody can read it", private=True)
    assert len(hub.commits) == 1
    refused(HubError, folder, "lab/open", "does not know the token", token="hf_wrong")
    refused(HubError, folder, "lab/new", "does not know the token", token="hf_wrong")
    monkeypatch.setenv("HF_TOKEN", "")
    refused(UserError, folder, "lab/x", "hf auth login", "HF_TOKEN")
    assert len(hub.commits) == 1


def _model(folder):
    from opensan.checkpoints import load_folder

    return load_folder(folder)


def test_a_hub_that_fails(hub, folder):
    (folder / "training.json").unlink(missing_ok=True)
    for part, failure, told in (
        ("/repos/create", fail(500), "answered 500"),
        ("/repos/create", hang_up, "cannot be reached or broke off"),
        ("/preupload/", fail(403), "403"),
        ("/upload/", fail(400), "answered 400"),
        ("/commit/", fail(413, message=f"too large, {TOKEN}"), "answered 413 (too large, ***)"),
        ("/commit/", hang_up, "the same command again goes on"),
    ):
        hub.failures = {part: failure}
        hub.private.clear()
        refused(HubError, folder, "lab/small", told)
    assert not hub.commits
    hub.failures = {}
    push(folder, "lab/small")
    hub.stop()
    refused(HubError, folder, "lab/small", "cannot be reached")


def test_an_upload_that_was_killed_is_repeated(hub, folder):
    """Killed while the weights are on their way: the hub has no half of a model, and the same command finishes."""
    reached = threading.Event()

    def take_half(request):
        request.rfile.read(1000)
        reached.set()
        request.connection.settimeout(30)
        while request.connection.recv(1 << 20):
            threading.Event().wait(0.05)

    hub.failures = {"/upload/": take_half}
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "opensan", "push", str(folder), "lab/small"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert reached.wait(120)
        process.send_signal(signal.SIGKILL)
        told = b"".join(process.communicate())
    assert TOKEN.encode() not in told
    assert not hub.commits and not hub.holds("lab/small")
    hub.failures = {}
    push(folder, "lab/small")
    assert hub.holds("lab/small")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_only_a_loaded_san_can_be_pushed(hub, folder, small_model):
    from opensan.segmenters.san import SanSegmenter

    with pytest.raises(UserError, match="built from a model in memory"):
        SanSegmenter(small_model).push_to_hub("lab/small")
    with pytest.raises(UserError, match="only a SAN"):
        opensan.load("maskclip:tiny").push_to_hub("lab/small")
    segmenter = opensan.load(folder)
    changed = _model(folder)
    changed.clip.visual.proj.data += 1
    save_folder(changed, folder)
    with pytest.raises(UserError, match="another model now"):
        segmenter.push_to_hub("lab/small")
    assert not hub.commits


def test_the_command_refuses_in_one_line(hub, folder, capsys):
    with pytest.raises(SystemExit) as end:
        main(["push", str(folder), "somebody/small"])
    told = capsys.readouterr()
    assert end.value.code == 1 and told.err.count("\n") == 1 and TOKEN not in told.err + told.out
