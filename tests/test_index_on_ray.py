"""Indexes whose images are encoded by workers: by a stand-in for Ray, and by Ray itself where it is there."""

import json
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import opensan
from opensan.errors import UserError
from opensan.index.head import NAME
from opensan.index.on_ray import Encoder, RayEncoders

from .test_index import content, picture
from .test_on_ray import StandIn, ray  # noqa: F401 (a fixture)

pytest.importorskip("lancedb", reason="indexes need lancedb")


def photos(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        picture(folder / f"{number}.png", number)
    return folder


def add(folder: Path, images: Path, loading: dict, notes: list[str], batch: int = 1, **options):
    encoders = RayEncoders(2, loading, batch=batch, note=notes.append)
    return opensan.Index(folder, loading["source"]).add(images, encoders=(encoders, encoders.maker()), **options)


@pytest.mark.parametrize("exact", [False, True])
def test_an_index_made_by_workers_is_that_of_one_process(ray: StandIn, model_folder, tmp_path, exact):  # noqa: F811
    folder, loading = photos(tmp_path / "photos", 7), {"source": str(model_folder), "device": "cpu"}
    shutil.copy(folder / "0.png", folder / "6.png")
    (folder / "bad.png").write_text("no image")
    deaths = iter([False, True, False, True] + [False] * 100)
    ray.dies = lambda call: call.method == "encode" and next(deaths)
    notes: list[str] = []
    added = add(tmp_path / "index", folder, loading, notes, exact=exact)
    assert (added.new, len(added.same), len(added.broken), len(notes)) == (6, 1, 1, 2)
    assert added.broken[0].startswith(f"{folder / 'bad.png'}: not an image")
    one = opensan.Index(tmp_path / "one", model_folder)
    one.add(folder, exact=exact)
    ours, alone = content(opensan.Index(tmp_path / "index")), content(one)

    def without_original(images: list, proposals: list) -> tuple:
        """Of two files with one content, whichever came first has the proposals."""
        same = {str(folder / "0.png"), str(folder / "6.png")}
        pairs = [("0 or 6" if row[0] in same else row[0], *row[1:]) for row in proposals]
        return [row for row in images if row[0] not in same], sorted(pairs)

    assert without_original(*ours) == without_original(*alone)
    picture(folder / "7.png", 7)
    one.add(folder)
    again = add(tmp_path / "index", folder, loading, notes, batch=3)
    assert (again.new, again.unchanged, len(again.broken)) == (1, 7, 1)
    picture(folder / "3.png", 33)
    assert one.add(folder).changed == add(tmp_path / "index", folder, loading, notes).changed == 1
    assert without_original(*content(opensan.Index(tmp_path / "index"))) == without_original(*content(one))


def test_what_a_driver_committed_before_it_died_stays_and_is_not_done_again(ray, model_folder, tmp_path, monkeypatch):  # noqa: F811
    folder, loading = photos(tmp_path / "photos", 6), {"source": str(model_folder), "device": "cpu"}
    monkeypatch.setattr("opensan.index.adding.COMMIT_IMAGES", 2)
    done: list[int] = []

    def dies(count: int, total: int) -> None:
        done.append(count)
        if count == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add(tmp_path / "index", folder, loading, [], progress=dies)

    again = add(tmp_path / "index", folder, loading, [])
    assert (again.new, again.unchanged) == (2, 4)
    opensan.Index(tmp_path / "one", model_folder).add(folder)
    assert content(opensan.Index(tmp_path / "index")) == content(opensan.Index(tmp_path / "one"))


def test_workers_of_another_model_are_refused(ray, model_folder, tmp_path):  # noqa: F811
    folder, loading = photos(tmp_path / "photos", 2), {"source": str(model_folder), "device": "cpu"}
    opensan.Index(tmp_path / "index", "tiny").add(folder)
    with pytest.raises(UserError, match="was made by model tiny"):
        add(tmp_path / "index", folder, loading, [])
    with pytest.raises(UserError, match=r"the worker on 10\.0\.0\.1: .*nowhere"):
        add(tmp_path / "other", folder, {"source": str(tmp_path / "nowhere")}, [])
    assert not (tmp_path / "other" / NAME).exists()
    assert "another model" in Encoder(loading).encode("of another", []).reason


def test_the_command_takes_the_indexs_own_model(ray, model_folder, run, tmp_path):  # noqa: F811
    folder = photos(tmp_path / "photos", 3)
    told = ("index", "add", tmp_path / "index", folder, "--device", "cpu", "--json")
    code, out, err = run(*told, "-m", model_folder, "--on", "ray", "--workers", 2)
    assert code == 0 and json.loads(out)["new"] == 3, err
    picture(folder / "new.png", 9)
    code, out, err = run(*told, "--on", "ray", "--workers", 2)
    assert code == 0 and (json.loads(out)["new"], json.loads(out)["unchanged"]) == (1, 3), err
    code, out, err = run(*told)
    assert code == 0 and json.loads(out)["unchanged"] == 4, err
    for options, said in (
        (("--workers", 2), "are for --on ray"),
        (("--on", "ray"), "--on ray needs --workers N"),
    ):
        code, _, err = run(*told, *options)
        assert code == 2 and said in err and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (260 MB; the extra `ray`)")
def test_ray_itself_and_a_driver_that_is_killed(tmp_path):
    folder = photos(tmp_path / "photos", 12)
    command = [sys.executable, "-m", "opensan", "index", "add", tmp_path / "index", folder, "--model", "tiny"]
    command += ["--device", "cpu", "--on", "ray", "--workers", "2"]
    driver = subprocess.Popen(list(map(str, command)))
    while not (tmp_path / "index" / NAME).exists():
        assert driver.poll() is None
        time.sleep(0.1)
    time.sleep(0.5)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    subprocess.run(list(map(str, command)), check=True)
    opensan.Index(tmp_path / "one", "tiny", device="cpu").add(folder)
    assert content(opensan.Index(tmp_path / "index")) == content(opensan.Index(tmp_path / "one"))
