"""Files are written whole or not at all, by any number of threads."""

import errno
import multiprocessing
import os
import stat
import threading

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from opensan.errors import UserError
from opensan.files import atomic_path, hold, keep_aside, link, remove_temporaries, temporary_path, write_text


def test_written_files_have_the_usual_permissions_and_the_umask_is_never_touched(tmp_path, monkeypatch):
    """A thread that changes the umask to read it changes it for all threads; another one may then keep the change."""
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("the umask is the whole process's"))
            write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(error), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_missing_folder_is_named_and_not_the_temporary_file(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        write_text(tmp_path / "nowhere" / "a.txt", "x")
    assert error.value.filename == str(tmp_path / "nowhere")


def test_a_library_that_makes_private_files_does_not_make_ours_private(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "a.safetensors") as temporary:
            save_file({"a": np.zeros(3)}, temporary)
            temporary.chmod(0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    "name", ["a.png", "b" * 251 + ".png", "\u4e16" * 83 + ".txt", "a." + "s" * 250, "x" * 255, "\udcff" * 200 + ".png"]
)
def test_temporary_names_are_no_longer_than_names_may_be(tmp_path, name):
    target = tmp_path / name
    assert len(os.fsencode(name)) <= 255
    assert len(os.fsencode(temporary_path(target).name)) <= max(len(os.fsencode(name)), 64)
    write_text(target, "x")
    link(target, tmp_path / ("l" + name[1:]))
    temporary = temporary_path(target)
    temporary.write_text("left")
    remove_temporaries(tmp_path, ["other"])
    assert temporary.exists()
    remove_temporaries(tmp_path, [name])
    assert len(list(tmp_path.iterdir())) == 2 and not temporary.exists()


def test_only_temporary_files_are_removed(tmp_path):
    ours = [".a.01234567.part.png", ".a.b.01234567.part", ".abc.abcd_123.part.txt"]
    others = ["a.01234567.part.png", ".a.part.png", ".part", ".a.0123456.part", "b"]
    (tmp_path / ".d.01234567.part").mkdir()
    for name in ours + others:
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others, ".d.01234567.part"}
    remove_temporaries(tmp_path / "nowhere")


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space") as caught, atomic_path(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "a.txt")
    with pytest.raises(OSError, match="No such file") as caught, atomic_path(tmp_path / "a.txt"):
        (tmp_path / "other").read_text()
    assert caught.value.filename == str(tmp_path / "other")


def test_a_full_disk_is_told_by_libraries_in_other_words(tmp_path):
    """safetensors raises an error of its own, which is no OSError."""
    with pytest.raises(OSError, match="No space left") as caught, atomic_path(tmp_path / "a.safetensors"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a.safetensors"))
    assert not list(tmp_path.iterdir())


def test_nothing_that_is_kept_aside_replaces_anything(tmp_path):
    for number in range(3):
        (tmp_path / "a").write_text(f"{number}")
        keep_aside(tmp_path / "a")
    (tmp_path / "a.changed4").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a").write_text("3")
    assert keep_aside(tmp_path / "a").name == "a.changed5"
    found = {path.name: path.read_text() for path in tmp_path.iterdir() if not path.is_symlink()}
    assert found == {"a.changed": "0", "a.changed2": "1", "a.changed3": "2", "a.changed5": "3"}


def test_a_lock_is_for_one_and_leaves_nothing(tmp_path):
    lock = tmp_path / "lock"
    with hold(lock, "busy"), pytest.raises(UserError, match="busy"), hold(lock, "busy"):
        pass
    assert not lock.exists()
    with pytest.raises(KeyError), hold(lock, "busy"):
        raise KeyError
    with hold(lock, "busy"):
        pass


def test_a_file_system_without_locks_is_told_in_a_line(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with (
        pytest.raises(UserError, match=r"has no file locks .No locks available.") as caught,
        hold(tmp_path / "l", "busy"),
    ):
        pass
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def _count(lock, shared, turns):
    for _ in range(turns):
        while True:
            try:
                with hold(lock, "busy"):
                    number = int(shared.read_text())
                    shared.write_text(str(number + 1))
                    break
            except UserError:
                continue


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, to be quick")
def test_who_has_a_removed_lock_does_not_hold_it(tmp_path):
    """The file is removed each time; one who opened it before must not take it for the one that is there now."""
    lock, shared = tmp_path / "lock", tmp_path / "count"
    shared.write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_count, args=(lock, shared, 300)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert shared.read_text() == "1200"


def test_threads_hold_it_by_turns_too(tmp_path):
    shared = tmp_path / "count"
    shared.write_text("0")
    threads = [threading.Thread(target=_count, args=(tmp_path / "lock", shared, 50)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shared.read_text() == "150"
