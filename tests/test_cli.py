"""The command line, on a small random model: what it writes, says, and exits with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import opensan
import opensan.segmenters.san
from opensan.checkpoints import load_folder, load_model
from opensan.checkpoints.official import to_official
from opensan.checkpoints.presets import PRESETS
from opensan.cli.asked_words import asked_vocabulary
from opensan.devices import checked_device, chosen_device
from opensan.errors import UserError
from opensan.jobs.folder import Job, plan
from opensan.text.cache import TextCache
from opensan.vocabulary import Vocabulary, ready_sets

from .conftest import GOLDENS

WORDS = "road, car|automobile, [red]sky, café"


def photograph(path: Path, seed: int = 0, size: tuple[int, int] = (60, 45)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size).save(path)
    return path


def files_in(folder: Path) -> set[str]:
    """Without what a run keeps its books in."""
    books = ("manifest.sqlite",)
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in books)
    return {str(path.relative_to(folder)) for path in files}


def test_one_image(run, tmp_path, model_folder):
    image = photograph(tmp_path / "street.jpg")
    out = tmp_path / "results"
    code, stdout, stderr = run("segment", image, "--words", WORDS, "--model", model_folder, "--out", out)
    assert (code, stderr) == (0, "")
    assert files_in(out) == {"street.labels.png", "street.overlay.png", "street.segments.json"}
    for name in files_in(out):
        assert str(out / name) in stdout.replace("\n", "")
    data = json.loads((out / "street.segments.json").read_text())
    assert data["image"] == {"width": 60, "height": 45}
    assert [word["name"] for word in data["words"]] == ["road", "car", "[red]sky", "café"]
    labels = np.asarray(Image.open(out / "street.labels.png"))
    for word in data["words"]:
        assert word["pixels"] == (labels == word["index"]).sum()
        assert (word["name"] in stdout) == (word["pixels"] > 0)
        if word["pixels"]:
            assert f"{100 * word['area']:.1f} %" in stdout
            assert f"{word['confidence']:.2f}" in stdout


def test_same_labels_as_in_python(run, tmp_path, model_folder):
    image = photograph(tmp_path / "x.png")
    run("segment", image, "--words", WORDS, "--background", "sea, wall", "--templates", "single",
        "--model", model_folder, "--out", tmp_path, "--format", "png")  # fmt: skip
    expected = opensan.load(model_folder).segment(image, WORDS, background="sea, wall", templates="single").labels
    found = np.asarray(Image.open(tmp_path / "x.labels.png")).astype(int)
    np.testing.assert_array_equal(np.where(found == 255, -1, found), expected)


def test_lists_given_in_several_options_are_one(run, tmp_path, model_folder):
    image = photograph(tmp_path / "x.png", 5)
    words = ("--words", "road", "--words", "sky|heaven, car", "--background", "sea", "--background", '["wall"]')
    formats = ("--format", "png", "--format", "json")
    code, _, stderr = run("segment", image, *words, "--model", model_folder, "--out", tmp_path, *formats)
    assert (code, stderr) == (0, "")
    vocabulary = json.loads((tmp_path / "x.segments.json").read_text())["vocabulary"]
    assert vocabulary["words"] == ["road", {"name": "sky", "synonyms": ["heaven"]}, "car"]
    assert vocabulary["background"] == ["sea", "wall"]
    assert (tmp_path / "x.labels.png").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--words-set", "pascal_voc_20", "--words-set", "ade20k_150"), "--words-set was given 2 times: choose one"),
        (("--words", "a", "--templates", "vild", "--templates", "single"), "--templates was given 2 times"),
        (("--words", '{"words": ["a"]}', "--words", "b"), "a JSON object is a whole vocabulary"),
    ],
)
def test_options_that_are_no_lists_are_given_once(run, tmp_path, options, says):
    code, _, stderr = run("segment", photograph(tmp_path / "x.png", 5), *options, "--out", tmp_path)
    assert code == 2 and says in stderr and len(stderr.strip().splitlines()) == 1


def test_folder_with_broken_files(run, tmp_path, model_folder):
    folder, out = tmp_path / "in", tmp_path / "out"
    photograph(folder / "a.jpg", 1)
    photograph(folder / "deep" / "er" / "a.jpg", 2, (33, 90))
    photograph(folder / "z.png", 3)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "m.png").write_bytes((folder / "z.png").read_bytes()[:-200])
    (folder / "text.jpg").write_text("no image")
    (folder / "notes.txt").write_text("not even by its name")
    code, stdout, stderr = run(
        "segment", folder, "--words", WORDS, "--model", model_folder, "--out", out, "--format", "png", "--batch", 4
    )
    assert code == 1
    assert files_in(out) == {"a.labels.png", "deep/er/a.labels.png", "z.labels.png"}
    complaints = stderr.strip().splitlines()
    assert len(complaints) == 3
    for name, complaint in zip(("empty.jpg", "m.png", "text.jpg"), complaints, strict=True):
        assert complaint.startswith(f"error: {folder / name}: ")
    assert "3 of 6 images done" in stdout
    assert len(stdout.strip().splitlines()) == 4


def test_only_broken_files(run, tmp_path, model_folder):
    (tmp_path / "x.jpg").write_text("no image")
    code, _, stderr = run("segment", tmp_path, "--words", "a", "--model", model_folder, "--out", tmp_path / "out")
    assert code == 1 and stderr.startswith("error: ") and len(stderr.strip().splitlines()) == 1
    assert files_in(tmp_path / "out") == set()


def test_equal_stems_do_not_collide(run, tmp_path, model_folder):
    for seed, name in enumerate(("a/x.jpg", "b/x.png", "b/x.jpg", "b/y.png")):
        photograph(tmp_path / name, seed)
    out = tmp_path / "out"
    code, _, _ = run("segment", tmp_path / "a", tmp_path / "b", "--words", WORDS, "--model", model_folder,
                     "--out", out, "--format", "png")  # fmt: skip
    assert code == 0
    assert files_in(out) == {"a/x.labels.png", "b/x.png.labels.png", "b/x.jpg.labels.png", "b/y.labels.png"}


def test_plan_never_gives_two_images_one_name(tmp_path):
    names = ["x.jpg", "x.png", "x.jpg.png", "d/x.jpg", "d/e/x.jpg", "e/x.jpg"]
    images = [photograph(tmp_path / name) for name in names]
    for arguments in ([tmp_path], images, [tmp_path / "d", *images[:3], tmp_path / "e"]):
        jobs = plan(images, arguments)
        assert [job.image for job in jobs] == images
        assert len({job.stem for job in jobs}) == len(images)
    assert plan([images[4]], [images[4]]) == [Job(images[4], "x")]


def test_results_among_photographs_are_not_photographs(run, tmp_path, model_folder):
    folder = tmp_path / "photographs"
    photograph(folder / "x.png")
    for out in (folder / "out", folder):
        for _ in range(2):
            code, stdout, _ = run("segment", folder, "--words", WORDS, "--model", model_folder, "--out", out)
            assert code == 0 and "wrote" in stdout  # one image, so the table and not a line each
        shutil.rmtree(folder / "out", ignore_errors=True)
    assert files_in(folder) == {"x.png", "x.labels.png", "x.overlay.png", "x.segments.json"}


def test_images_are_streamed(run, tmp_path, model_folder, monkeypatch):
    for index in range(24):
        photograph(tmp_path / f"{index}.png", index)
    alive: list[weakref.ref] = []
    most = 0
    real = opensan.images.open_image

    def watched(*arguments, **options):
        nonlocal most
        array = real(*arguments, **options)
        alive.append(weakref.ref(array))
        most = max(most, sum(reference() is not None for reference in alive))
        return array

    monkeypatch.setattr(opensan.segmenters.base, "open_image", watched)
    code, _, _ = run(
        "segment", tmp_path, "--words", "a", "--model", model_folder, "--out", tmp_path / "o", "--batch", 2
    )
    assert code == 0 and len(alive) == 24
    assert most <= 8  # of batches of 2: one being read, two in use or waiting for more of their shape, one written


@pytest.mark.parametrize("batch", [1, 3])
def test_batch_size_changes_nothing(run, tmp_path, model_folder, batch):
    sizes = [(60, 45), (60, 45), (45, 60), (100, 30)]
    images = [photograph(tmp_path / f"{index}.png", index, size) for index, size in enumerate(sizes)]
    run("segment", *images, "--words", WORDS, "--model", model_folder, "--out", tmp_path / "o", "--batch", batch)
    san = opensan.load(model_folder)
    for index, image in enumerate(images):
        found = np.asarray(Image.open(tmp_path / "o" / f"{index}.labels.png"))
        assert (found == san.segment(image, WORDS).labels).mean() > 0.999


@pytest.mark.parametrize("words", ["car / truck", "car • truck", "car|truck", "car and truck", "car - truck"])
def test_words_without_commas_are_one_word_and_a_line_says_so(words, capsys):
    asked_vocabulary([words], None, None, None, None)
    assert "is all one word, which gets every pixel: separate words by commas" in capsys.readouterr().err
    for other in ("traffic light", f"{words}, sky"):
        asked_vocabulary([other], None, None, None, None)
    asked_vocabulary([words], None, None, ["sky"], None)
    assert not capsys.readouterr().err


def test_words_from_file_and_from_set(run, tmp_path, model_folder):
    image = photograph(tmp_path / "x.png")
    (tmp_path / "words.txt").write_text("road\ncar | automobile  # a comment\n", encoding="utf-8")
    common = ("--model", model_folder, "--out", tmp_path, "--format", "json")
    for option, value, names in (
        ("--words-file", tmp_path / "words.txt", ["road", "car"]),
        ("--words-set", "pascal_voc_20", None),
    ):
        code, _, stderr = run("segment", image, option, value, *common)
        assert (code, stderr) == (0, "")
        data = json.loads((tmp_path / "x.segments.json").read_text())
        assert [word["name"] for word in data["words"]] == (names or opensan.Vocabulary.ready(value).names)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["segment"], 2, "Missing argument"),
        (["segment", "x.png"], 2, "give the words by exactly one of --words, --words-file, --words-set"),
        (["segment", "x.png", "--words", "a", "--words-set", "b"], 2, "give the words by exactly one of"),
        (
            ["segment", "x.png", "--words", "a", "--format", "png,bmp"],
            2,
            "'bmp': choose from png, overlay, json, panoptic, boxes, coco",
        ),
        (["segment", "x.png", "--words", "a", "--format", ","], 2, "no output format"),
        (["segment", "x.png", "--words", "a", "--batch", "0"], 2, "--batch"),
        (["segment", "x.png", "--words", "a", "--dtype", "int8"], 2, "--dtype"),
        (["segment", "x.png", "--wrods", "a"], 2, "No such option: --wrods"),
        (["segmnet"], 2, "No such command 'segmnet'"),
        (["segment", "x.png", "--words", "a,,b"], 1, "word 2 is blank"),
        (["segment", "x.png", "--words", "a,b,a"], 1, "repeats"),
        (["segment", "x.png", "--words", ""], 1, "the vocabulary is empty"),
        (["segment", "x.png", "--words-set", "coco"], 1, "choose from ade20k_150"),
        (["segment", "x.png", "--words-file", "none.txt"], 1, "none.txt"),
        (["segment", "none.png", "--words", "a"], 1, "none.png: does not exist"),
        (["segment", "empty", "--words", "a"], 1, "no images in this folder"),
        (
            ["segment", "x.png", "--words", "a", "--model", "no-such-model"],
            1,
            "known names are photo, tiny, san-vit",
        ),
        (["segment", "x.png", "--words", "a", "--model", "empty"], 1, "config.json"),
        (["segment", "x.png", "--words", "a", "--out", "x.png/out"], 1, "cannot write there"),
        (["segment", "x.png", "--words", "a", "--device", "abacus", "--model", "MODEL"], 1, "'abacus'"),
        (["segment", "x.png", "--words", "a", "--max-pixels", "9", "--model", "MODEL"], 1, "more than the limit of 9"),
        (["segment", "x.png", "--words", "long " * 80, "--model", "MODEL"], 1, "at most 77 tokens"),
        (["convert", "none.pth", "new"], 1, "none.pth"),
        (["convert", "x.png", "new"], 1, "x.png: not a readable PyTorch checkpoint"),
        (["parity", "none.npz"], 1, "none.npz: no such file"),
        (["parity", "x.png"], 1, "x.png: not a golden file"),
        (["words", "coco"], 1, "choose from ade20k_150"),
    ],
)
def test_mistakes_get_one_line(run, tmp_path, monkeypatch, model_folder, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    photograph(tmp_path / "x.png")
    (tmp_path / "empty").mkdir()
    found, stdout, stderr = run(*[model_folder if argument == "MODEL" else argument for argument in arguments])
    assert (found, stdout) == (code, "")
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert message in stderr


def test_unwritable_output_is_found_before_the_work(run, tmp_path):
    """The model named does not exist, yet it is the folder that is complained about."""
    (tmp_path / "file").write_text("mine")
    code, _, stderr = run("segment", photograph(tmp_path / "x.png"), "--words", "a", "--model", "none",
                          "--out", tmp_path / "file")  # fmt: skip
    assert code == 1 and "cannot write there" in stderr


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_interrupt_keeps_what_is_done(tmp_path, model_folder):
    for index in range(300):
        photograph(tmp_path / "in" / f"{index:03}.png", index, (200, 150))
    out = tmp_path / "out"
    command = [sys.executable, "-c", "from opensan.cli import main; main()", "segment", tmp_path / "in", "--words",
               WORDS, "--model", model_folder, "--out", out]  # fmt: skip
    # A process group of its own, and SIGINT not ignored, as it is for a background job of some shells.
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    second = out / "001.segments.json"  # its last file: by then the first image is not only written but counted
    deadline = time.monotonic() + 300
    while not second.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    started = second.exists()
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=300)
    assert started, stderr  # an interrupt while Python itself starts is not opensan's to tell
    assert process.returncode == 130, stderr
    done = len(stdout.splitlines())
    assert stderr.startswith(f"interrupted: {done} of 300 images done") and stderr.count("\n") == 1
    assert 0 < done < 300
    for index in range(done):
        for ending in (".labels.png", ".overlay.png"):
            Image.open(out / f"{index:03}{ending}").load()
        json.loads((out / f"{index:03}.segments.json").read_text())
    assert len(files_in(out)) <= 3 * done + 9  # one being computed, one written
    assert not [name for name in files_in(out) if "part" in name]


@pytest.mark.parametrize("said, line", [((), "interrupted\n"), (("go on so",), "interrupted: go on so\n")])
@pytest.mark.parametrize("arguments, where", [
    (["words"], "opensan.vocabulary.Vocabulary.ready"),
    (["data", "check", "."], "opensan.data.check.FolderCheck"),
])  # fmt: skip
def test_an_interruption_is_said_by_every_command(run, monkeypatch, arguments, where, said, line):
    def interrupt(*_, **__):
        raise KeyboardInterrupt(*said)

    monkeypatch.setattr(where, interrupt)
    assert run(*arguments) == (130, "", line)


def test_the_cache_is_shown_and_cleared(run, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENSAN_CACHE", str(tmp_path))
    assert run("cache") == (0, f"{tmp_path / 'text'}: 0.0 MiB, limit 512 MiB\n", "")
    cache = TextCache(tmp_path / "text", "tower", 512)
    cache.write({bytes([n]): np.ones(512, np.float32) for n in range(100)})
    (tmp_path / "text" / "mine.sqlite").touch()
    shown = f"{cache.path.stat().st_size / 2**20:.1f} MiB"
    assert run("cache") == (0, f"{tmp_path / 'text'}: {shown}, limit 512 MiB\n", "")
    assert run("cache", "--clear") == (0, f"removed {shown} from {tmp_path / 'text'}\n", "")
    assert [path.name for path in (tmp_path / "text").iterdir()] == ["mine.sqlite"]


def test_help_and_words_import_no_torch():
    code = (
        "import sys\nfrom opensan.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as error:\n    assert not error.code, error.code\n"
        "assert not {'torch', 'numpy'} & sys.modules.keys()\n"
    )
    for arguments in ([], ["--help"], ["segment", "--help"], ["convert", "-h"], ["--version"], ["words"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), arguments
        assert done.stdout


def test_words_lists_sets_and_prints_one(run):
    code, stdout, _ = run("words")
    assert code == 0
    assert "coco_stuff_171        171 words" in stdout and "ade20k_847            847 words" in stdout
    code, stdout, _ = run("words", "pascal_voc_20")
    assert stdout.splitlines() == opensan.Vocabulary.ready("pascal_voc_20").names


def test_a_printed_set_is_a_words_file(run, tmp_path):
    for name in ("ade20k_847", "coco_stuff_171", "pascal_context_459"):
        path = tmp_path / "words.txt"
        path.write_text(run("words", name)[1], encoding="utf-8")
        assert opensan.Vocabulary.from_file(path).names == opensan.Vocabulary.ready(name).names


def test_models_lists_every_name_with_its_kind_and_proof(run, monkeypatch):
    code, stdout, stderr = run("models")
    assert (code, stderr) == (0, "")
    lines = stdout.splitlines()
    assert lines[0].split()[:3] == ["photo", "efficientnet_lite", "labels"]
    assert lines[1].split()[:3] == ["tiny", "clip_vit", "labels"]
    for line, (name, preset) in zip(lines[2:-2], PRESETS.items(), strict=True):
        use = "labels" if preset.official else "trains"
        assert line.split(maxsplit=3) == [name, preset.config.clip.kind, use, preset.proved]
    assert lines[-1].startswith("only photo and tiny were tested with their real weights here; all others")
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = run("models")[1]
    assert all(name in table for name in PRESETS) and "proved" in table and "untested with theirs" in table


def test_convert_writes_what_load_reads(run, tmp_path, small_model, small_config, monkeypatch):
    small = replace(PRESETS["san-vit-b16"], config=small_config)
    monkeypatch.setattr("opensan.checkpoints.pickles.PRESETS", {"small": small})
    torch.save({"model": to_official(small_model.state_dict(), small_config)}, tmp_path / "san.pth")
    code, stdout, stderr = run("convert", tmp_path / "san.pth", tmp_path / "folder")
    assert (code, stderr) == (0, "")
    assert f"--model {tmp_path / 'folder'}" in stdout
    found = load_folder(tmp_path / "folder").state_dict()
    for name, tensor in small_model.state_dict().items():
        assert torch.equal(found[name], tensor), name
    code, _, stderr = run("convert", tmp_path / "san.pth", tmp_path / "folder")
    assert code == 1 and "exists already" in stderr


def test_parity_passes_and_fails(run, tmp_path):
    code, stdout, _ = run("parity", GOLDENS / "tiny_b.npz")
    assert code == 0 and "FAIL" not in stdout
    with np.load(GOLDENS / "tiny_b.npz") as file:
        arrays = dict(file)
    arrays["expect/mask_logits"] = arrays["expect/mask_logits"] + np.float32(0.01)
    np.savez(tmp_path / "wrong.npz", **arrays)
    code, stdout, _ = run("parity", GOLDENS / "tiny_b.npz", tmp_path / "wrong.npz")
    assert code == 1
    assert [line.split()[1] for line in stdout.splitlines() if "FAIL" in line] == ["mask_logits"]


def test_a_name_the_terminal_cannot_show(tmp_path, model_folder):
    image = photograph(tmp_path / "x.png")
    code = "from opensan.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "segment", image, "--words", "树", "--model", model_folder, "--out", tmp_path],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads((tmp_path / "x.segments.json").read_text(encoding="utf-8"))["words"][0]["name"] == "树"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_output_that_cannot_be_written_is_one_line():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "opensan", "words", "pascal_voc_20"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


def test_options_that_commands_share_are_spelled_the_same(run, tmp_path, model_folder):
    image = photograph(tmp_path / "a.png")
    run("segment", image, "-w", "sea, sky", "-m", model_folder, "-o", tmp_path / "out", "--device", "auto")
    assert (tmp_path / "out" / "a.labels.png").is_file()
    shorts = {"--out DIR": "-o, ", "--model <": "-m, ", "--words <": "-w, "}
    for command in ("segment", "segment-raster", "segment-video", "eval", "export", "ui", "serve", "data prepare"):
        _, said, _ = run(*command.split(), "--help")
        for long, short in shorts.items():
            assert said.count(long) == said.count(short + long), (command, long)


def test_help_is_in_groups_and_whole(run):
    _, said, _ = run("segment", "--help")
    titles = [line for line in said.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Arguments:", "Words:", "Model:", "Results:", "Objects:", "Many machines:", "Options:"]
    assert "..." not in run("--help")[1].partition("Commands:")[2]


def test_auto_is_the_gpu_where_there_is_one(monkeypatch):
    for there, name in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert chosen_device("auto") == name
    assert chosen_device("cuda:1") == "cuda:1"
    assert checked_device("auto").type == "cpu"


def test_a_mistyped_model_is_guessed():
    with pytest.raises(UserError, match=r"no model 'san-vit-b15': .*; did you mean 'san-vit-b16'\?$"):
        load_model("san-vit-b15")


def test_words_as_json(run):
    every = json.loads(run("words", "--json")[1])
    assert list(every) == ready_sets() and all(names == Vocabulary.ready(one).names for one, names in every.items())
    assert json.loads(run("words", "ade20k_150", "--json")[1]) == {"ade20k_150": every["ade20k_150"]}


def test_an_unknown_choice_is_named_with_the_known_ones(run):
    code, _, errors = run("segment", "x.png", "--words", "car", "--speed", "slow")
    assert code == 2
    known = "'exact', 'fast', 'fastest'"
    assert errors == f"error: Invalid value for '--speed': 'slow' is not one of {known} (see opensan segment --help)\n"
