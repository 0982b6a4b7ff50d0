"""Folders on many machines: by a stand-in for Ray that can fail in any way, and by Ray itself where it is there."""

import json
import os
import shlex
import signal
import socket
import sys
import types
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import opensan
from opensan.errors import UserError
from opensan.files import temporary_path
from opensan.images import list_images
from opensan.jobs import on_ray
from opensan.jobs.folder import Broken, Question, Written, plan
from opensan.jobs.ledger import LOCK
from opensan.jobs.on_ray import RayRun, Worker, Workers, cluster
from opensan.vocabulary import Vocabulary

from .documentation import blocks, check_opensan
from .test_folders import contents, photographs, records, run_folder

WORDS = "road, car|automobile, sky"


class RayError(Exception):
    """Ray's."""


class RayActorError(RayError):
    """Ray's: a worker died."""


class RayTaskError(RayError):
    """Ray's: a worker raised."""

    def __init__(self, cause: BaseException) -> None:
        self.cause = cause


class Call:
    def __init__(self, actor: "Actor", method: str, arguments: tuple) -> None:
        self.actor, self.method, self.arguments = actor, method, arguments
        self.done = False
        self.answer: object = None
        self.error: Exception | None = None

    def compute(self, dies) -> None:
        if self.done:
            return
        self.done = True
        if self.actor.dead or dies(self):
            self.actor.dead = True
            self.error = RayActorError("The actor died unexpectedly.\nKilled.")
            return
        try:
            self.answer = getattr(self.actor.object, self.method)(*self.arguments)
        except Exception as error:
            self.error = RayTaskError(error)


class Actor:
    def __init__(self, made) -> None:
        self.dead = False
        self.object = made

    def __getattr__(self, method: str):
        return types.SimpleNamespace(remote=lambda *arguments: Call(self, method, arguments))


class StandIn(types.ModuleType):
    """Ray's functions that the package calls, in this process, one call after the other."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.exceptions = types.SimpleNamespace(
            RayError=RayError, RayActorError=RayActorError, RayTaskError=RayTaskError
        )
        self.util = types.SimpleNamespace(get_node_ip_address=lambda: "10.0.0.1")
        self.dies = lambda call: False
        self.asked: dict = {}
        self.actors: list[Actor] = []
        self.resources = {"CPU": 4.0}

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict:
        return self.resources

    available_resources = cluster_resources

    def remote(self, **asked):
        self.asked = asked

        def hire(kind, *arguments) -> Actor:
            self.actors.append(Actor(kind(*arguments)))
            return self.actors[-1]

        return lambda kind: types.SimpleNamespace(remote=lambda *arguments: hire(kind, *arguments))

    def wait(self, refs, num_returns, timeout):
        if timeout:
            refs[0].compute(self.dies)
        done = [ref for ref in refs if ref.done]
        return done, [ref for ref in refs if not ref.done]

    def get(self, ref):
        assert ref.done
        if ref.error:
            raise ref.error
        return ref.answer

    def kill(self, actor: Actor) -> None:
        actor.dead = True


@pytest.fixture
def segmenter(model_folder):
    return opensan.load(model_folder)


@pytest.fixture
def ray(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    monkeypatch.setattr(on_ray, "find_spec", lambda name: name)
    return stand_in


def loading(model_folder) -> dict:
    return {"source": str(model_folder), "device": "cpu"}


def on_workers(model_folder, folder: Path, out: Path, count=2, words=WORDS, batch=1, formats=("png",), **options):
    """(stems written, reasons of broken ones, notes)"""
    out.mkdir(exist_ok=True)
    notes: list[str] = []
    with cluster(None, count):
        question = Question(Vocabulary.parse(words), out, formats)
        workers = Workers(count, loading(model_folder) | options, question, note=notes.append)
        jobs = plan(list_images([folder]), [folder])
        with RayRun(workers, jobs, batch=batch) as run, closing(run.results()) as found:
            results = list(found)
            notes += run.notes
    written = [result.job.stem for result in results if isinstance(result, Written)]
    assert all(result.job in jobs for result in results)
    return sorted(written), [result.reason for result in results if isinstance(result, Broken)], notes


@pytest.mark.parametrize("batch", [1, 3])
def test_results_are_those_of_one_process_and_each_continues_the_other(
    ray, model_folder, segmenter, tmp_path, batch, monkeypatch
):
    folder = photographs(tmp_path / "in", 7)
    (folder / "bad.png").write_text("no image")
    formats = ("png", "json", "coco")
    run_folder(segmenter, folder, tmp_path / "one", formats)
    monkeypatch.chdir(tmp_path)
    written, broken, notes = on_workers(model_folder, Path("in"), Path("out"), batch=batch, formats=formats)
    assert len(written) == 7 and len(broken) == 1 and "bad.png: not an image" in broken[0] and not notes
    assert contents(tmp_path / "out") == contents(tmp_path / "one")
    assert run_folder(segmenter, folder, tmp_path / "out", formats)[0] == []
    (tmp_path / "out" / "0" / "000.labels.png").unlink()
    assert on_workers(model_folder, folder, tmp_path / "out", formats=formats)[0] == ["0/000"]
    written, _, notes = on_workers(model_folder, folder, tmp_path / "out", words="tree, sky", formats=formats)
    assert len(written) == 7 and notes == ["7 of 8 images were done with other words: they are done again"]


def test_a_worker_that_dies_is_replaced_and_nothing_is_lost_or_done_twice(ray, model_folder, segmenter, tmp_path):
    folder = photographs(tmp_path / "in", 12)
    deaths = iter([False, True, False, False, True, True, False, True] + [False] * 100)

    def dies(call) -> bool:
        if call.method != "label" or not next(deaths):
            return False
        half = temporary_path(tmp_path / "out" / f"{call.arguments[1][0].stem}.labels.png")
        half.parent.mkdir(exist_ok=True)
        half.write_bytes(b"half")
        return True

    ray.dies = dies
    written, broken, notes = on_workers(model_folder, folder, tmp_path / "out", count=3, batch=2)
    assert len(written) == len(set(written)) == 12 and not broken and len(ray.actors) > 3
    assert len(notes) == 4 and all("a worker died: another is started" in line for line in notes)
    assert sorted(record["place"] for record in records(tmp_path / "out")) == written
    run_folder(segmenter, folder, tmp_path / "one")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def test_workers_serve_several_runs(ray, model_folder, tmp_path):
    folder, out = photographs(tmp_path / "in", 3), tmp_path / "out"
    out.mkdir()
    workers = Workers(2, loading(model_folder), Question(Vocabulary.parse(WORDS), out, ("png",)))
    images = list_images([folder])
    for number in (2, 3):
        with RayRun(workers, plan(images[:number], [folder]), batch=2) as run, closing(run.results()) as results:
            assert len(list(results)) == number - (number == 3) * 2
    assert len(ray.actors) == 2


def test_what_a_dead_worker_had_is_done_at_the_end(ray, model_folder, tmp_path):
    """Where something kills workers again and again, no image is its victim three times and called broken."""
    folder = photographs(tmp_path / "in", 6)
    called = []

    def dies(call) -> bool:
        if call.method != "label":
            return False
        called.append([job.stem for job in call.arguments[1]])
        return len(called) == 1

    ray.dies = dies
    written, broken, _ = on_workers(model_folder, folder, tmp_path / "out", count=1)
    assert len(written) == 6 and not broken and called[0] in called[-2:]


def test_an_image_that_kills_workers_is_broken_in_the_end(ray, model_folder, tmp_path):
    folder = photographs(tmp_path / "in", 6)
    ray.dies = lambda call: call.method == "label" and any(job.stem == "1/001" for job in call.arguments[1])
    written, broken, _ = on_workers(model_folder, folder, tmp_path / "out", batch=2)
    assert len(written) == 5 and "1/001" not in written
    (reason,) = broken
    assert reason.endswith("001.png: 3 workers died while they worked on it")


def test_workers_that_can_not_take_part_are_named_in_one_line(ray, model_folder, tmp_path, monkeypatch):
    folder = photographs(tmp_path / "in", 4)
    with pytest.raises(UserError, match=r"the worker on 10\.0\.0\.1: .*nowhere"):
        on_workers(tmp_path / "nowhere", folder, tmp_path / "out")
    through, number = opensan.load, iter(range(9))

    def load(source, **options):
        if next(number) == 0:
            raise UserError(f"{source}: does not exist")
        return through(source, **options)

    monkeypatch.setattr("opensan.segmenters.load.load", load)
    written, _, notes = on_workers(model_folder, folder, tmp_path / "out")
    assert len(written) == 4 and len(notes) == 1 and "does not exist: it is not used" in notes[0]
    ray.dies = lambda call: call.method == "describe"
    with pytest.raises(UserError, match=r"workers die while they start \(Killed\.\)"):
        on_workers(model_folder, folder, tmp_path / "other")
    assert len(ray.actors) < 20


def test_a_worker_with_another_model_or_folder_writes_nothing(model_folder, ray, tmp_path):
    folder, out = photographs(tmp_path / "in", 1), tmp_path / "out"
    out.mkdir()
    question = Question(Vocabulary.parse(WORDS), out, ("png",))
    worker = Worker(loading(model_folder), question, False)
    jobs = plan(list_images([folder]), [folder])
    assert "another model" in worker.label("key", jobs).reason
    key = on_ray.settings_key(question.settings(worker._segmenter))
    assert "must share it" in worker.label(key, jobs).reason
    assert not list(out.iterdir())
    (out / LOCK).touch()
    (written,) = worker.label(key, jobs)
    assert isinstance(written, Written)


def test_a_full_disk_or_a_fault_ends_the_run(ray, model_folder, tmp_path, monkeypatch):
    folder = photographs(tmp_path / "in", 4)

    def full(*_: object):
        raise UserError("out: cannot write there (No space left on device)")

    monkeypatch.setattr(on_ray, "label_some", full)
    with pytest.raises(UserError, match="No space left"):
        on_workers(model_folder, folder, tmp_path / "out")
    monkeypatch.setattr(on_ray, "label_some", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        on_workers(model_folder, folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("device", "gpus", "asked"), [("auto", 0, 0), ("auto", 2, 1), ("cpu", 2, 0), ("cuda", 0, 1), ("cuda:1", 2, None)]
)
def test_each_worker_gets_its_device_from_ray(ray, model_folder, tmp_path, device, gpus, asked, monkeypatch):
    ray.resources = {"CPU": 4.0, "GPU": float(gpus)}
    monkeypatch.setattr("opensan.segmenters.load.load", lambda **_: 1 / 0)
    question = Question(Vocabulary.parse(WORDS), tmp_path, ("png",))
    if asked is None:
        with pytest.raises(UserError, match="choose auto, cpu or cuda"):
            Workers(1, {"device": device}, question)
        return
    with pytest.raises(ZeroDivisionError):
        Workers(1, {"device": device}, question)
    assert ray.asked["num_gpus"] == asked
    with pytest.raises(ZeroDivisionError):
        Workers(1, {"device": device}, question, per_gpu=4)
    assert ray.asked["num_gpus"] == asked / 4 and ray.asked["num_cpus"] == 1


def test_the_rest_and_the_threshold_are_asked_of_workers(ray, model_folder, run, tmp_path):
    photographs(tmp_path / "in", 2)
    options = ("-w", WORDS, "-m", model_folder, "--rest", "--threshold", "0.9", "--json", "--device", "cpu")
    code, out, err = run("segment", tmp_path / "in", *options, "-o", tmp_path / "one")
    assert code == 0, err
    told = ("segment", tmp_path / "in", *options, "-o", tmp_path / "out", "--on", "ray", "--workers", 2)
    code, again, err = run(*told)
    assert (code, err) == (0, "")
    assert {json.loads(line)["unlabelled"] for line in again.splitlines()} == {
        json.loads(line)["unlabelled"] for line in out.splitlines()
    }
    assert contents(tmp_path / "one") == contents(tmp_path / "out")
    assert run(*told)[:2] == (0, "")


def test_options_that_contradict_each_other(ray, model_folder, run, tmp_path, monkeypatch):
    image = photographs(tmp_path / "in", 1) / "0" / "000.png"
    for options, said in (
        (("--workers", 2), "are for --on ray"),
        (("--address", "auto"), "are for --on ray"),
        (("--workers-per-gpu", 2), "is for --on ray"),
        (("--on", "ray"), "--on ray needs --workers N"),
        (("--on", "ray", "--workers", 0), "--workers"),
        (("--on", "dask", "--workers", 1), "--on"),
        (("--on", "ray", "--workers", 1, "--show"), "leave out --show"),
        (("--on", "ray", "--workers", 1, "--explain", "1,1"), "leave out --explain"),
    ):
        code, _, err = run("segment", image, "-w", WORDS, "-m", model_folder, "-o", tmp_path / "out", *options)
        assert code == 2 and said in err and err.count("\n") == 1, (options, err)


def test_a_cluster_that_can_not_be_reached_is_one_line(ray, model_folder, run, tmp_path, monkeypatch):
    folder = photographs(tmp_path / "in", 1)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def refuse(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    ray.init = refuse
    asked = ("segment", folder, "-w", WORDS, "-m", model_folder, "-o", tmp_path / "out", "--on", "ray", "--workers", 1)
    for given, said in (
        (address, f"the Ray cluster at {address} can't be reached (Connection refused)"),
        (f"ray://{address}", "(Connection refused)"),
        ("auto", "the Ray cluster at auto can't be reached (Could not find any running Ray instance.)"),
        ("somewhere", "must be HOST:PORT, ray://HOST:PORT, or auto"),
    ):
        code, out, err = run(*asked, "--address", given)
        assert (code, out) == (1, "") and said in err and err.count("\n") == 1, err
    assert not (tmp_path / "out" / "manifest.sqlite").exists()


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_one_line_says_how_to_install_it(model_folder, run, tmp_path):
    folder = photographs(tmp_path / "in", 1)
    code, _, err = run(
        *("segment", folder, "-w", WORDS, "-m", model_folder, "-o", tmp_path / "out", "--on", "ray", "--workers", 1)
    )
    assert code == 1 and err.count("\n") == 1
    assert "--on ray needs Ray, which is not installed: pip install '.[ray]'" in err


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (260 MB; the extra `ray`)")
def test_ray_itself_and_a_worker_that_is_killed(model_folder, segmenter, tmp_path, capfd):
    folder = photographs(tmp_path / "in", 12)
    run_folder(segmenter, folder, tmp_path / "one", ("png", "json"))
    out = tmp_path / "out"
    out.mkdir()
    with cluster(None, 2):
        question = Question(Vocabulary.parse(WORDS), out, ("png", "json"))
        notes: list[str] = []
        workers = Workers(2, loading(model_folder), question, note=notes.append)
        jobs = plan(list_images([folder]), [folder])
        import ray

        with RayRun(workers, jobs) as run, closing(run.results()) as results:
            found = [next(results)]
            (pid,) = {ray.get(workers._ready[0].actor.__ray_call__.remote(lambda self: os.getpid()))}
            os.kill(pid, signal.SIGKILL)
            found += results
    assert len(found) == 12 and all(isinstance(result, Written) for result in found)
    assert contents(out) == contents(tmp_path / "one") and len(records(out)) == 12
    assert any("a worker died" in line for line in notes)
    assert capfd.readouterr().out == ""  # where results are


def test_the_example_for_kubernetes_is_whole():
    """It parses, its command exists, and there is room for all workers that it asks for."""
    (block,) = [block for block in blocks("docs/many-machines.md") if block.title == "opensan-job.yaml"]
    job = yaml.safe_load(block.text)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    program, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "opensan"
    check_opensan(arguments)
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    pods = [cluster["headGroupSpec"]["template"]["spec"], group["template"]["spec"]]
    for pod in pods:
        (container,) = pod["containers"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
        for path in (arguments[1], arguments[arguments.index("--out") + 1], arguments[arguments.index("--model") + 1]):
            assert any(path.startswith(f"{mount}/") for mount in mounted.values())
        assert container["image"] == pods[0]["containers"][0]["image"]
    cores = int(pods[1]["containers"][0]["resources"]["requests"]["cpu"])
    assert int(arguments[arguments.index("--workers") + 1]) == group["maxReplicas"] * cores


@pytest.mark.parametrize(("workers", "cores"), [(1, 4), (2, 2), (3, 1), (9, 1)])
def test_this_machine_is_divided_among_workers_and_a_cluster_gives_each_a_core(ray, monkeypatch, workers, cores):
    """A worker that asked a cluster for more cores than a machine there has would wait for ever."""
    started = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray._private.worker", types.ModuleType("ray._private.worker"))
    ray.init = lambda address, num_cpus=None, **_: started.append((address, num_cpus))
    ray.shutdown = lambda: None
    with cluster(None, workers) as cpus:
        assert cpus == cores
    with cluster("auto", workers) as cpus:
        assert cpus == 1
    assert started == [("local", workers * cores), ("auto", None)]
