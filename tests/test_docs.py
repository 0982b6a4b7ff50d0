"""The README, the notebook and every page of docs/ are followed: their blocks are run in order, or checked."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import tasks
from opensan.data.prepare import READERS
from opensan.data.segmentation_folder import SegmentationFolder
from opensan.vocabulary import ready_sets

from .desks import lay_out
from .documentation import PAGES, ROOT, Reader, blocks, commands, find_command, options_of, read_page

SLOW = {"docs/reliability.md", "docs/export.md", "docs/tasks.md"}


def after_first_photograph() -> None:
    told = re.findall(r"^\| `(street\.\S+)` \|", read_page("docs/first-photograph.md"), re.MULTILINE)
    assert len(told) == 3 and set(told) <= {path.name for path in Path("out").iterdir()}


def after_evaluation() -> None:
    """Labelled, labelled for the table, saved, and computed from what was saved: the same figures."""
    results = ("results", "table", "results-saved", "recomputed")
    figures = [repr(json.loads(Path(name, "street", "metrics.json").read_text())["metrics"]) for name in results]
    assert len(set(figures)) == 1
    for name in re.findall(r"^\| `([a-z.]+)`", read_page("docs/evaluation.md"), re.MULTILINE):
        assert Path("results", "street", name).exists(), name


def after_folders() -> None:
    names = set(re.findall(r"`((?:coco|yolo|voc|labelstudio)/[^`]*)`", read_page("docs/folders.md")))
    assert names
    for name in names:
        assert list(Path("results").glob(name.replace("NAME", "**/court"))), name


def after_data() -> None:
    assert {path.name for path in Path("prepared").iterdir()} == {n for n, reader in READERS.items() if reader.expected}


def after_own_data() -> None:
    splits = {"streets": "all", "parts": "all", "shop": "val", "scenes": "mine", "saved": "val", "download": "val"}
    splits |= {"traffic": "all", "desk": "all"}
    for name, split in splits.items():
        assert len(SegmentationFolder(Path("prepared", name), split)) == 1
    for name in ("streets-without-background", "saved"):
        folder = SegmentationFolder(Path("prepared", name), splits.get(name, "all"))
        assert folder.vocabulary.names == ["car"]


def after_training() -> None:
    for name in ("model/config.json", "log.csv", "validation.csv", "curves.png", "recipe.yaml", "checkpoints"):
        assert Path("runs", "street", name).exists(), name


def after_huge_images() -> None:
    for name in ("orthophoto", "satellite"):
        told = ("labels.tif", "labels.tif.aux.xml", "labels.qml", "polygons.geojson", "preview.png")
        assert {path.name for path in Path("out").glob(f"{name}.*")} == {f"{name}.{end}" for end in told}


def after_video() -> None:
    for folder in ("out", "every5", "results"):
        told = set(re.findall(r"^\| `(street\.[a-z]+)", read_page("docs/video.md"), re.MULTILINE))
        assert {path.name.removesuffix(".mp4").removesuffix(".csv") for path in Path(folder).glob("street.*")} == told
        assert {path.name for path in Path(folder).iterdir() if not path.name.startswith("street.")} == {
            "manifest.sqlite"
        }


def after_tasks() -> None:
    for name in (
        *("out/court.overlay.png", "out/again.labels.png", "annotated/coco/annotations/instances_all.json"),
        *("trained/court.segments.json", "evaluation/mine/index.html", "answer.json", "light/court.labels.png"),
        *("video/street.overlay.mp4", "exported/requirements.txt"),
    ):
        assert Path(name).stat().st_size, name


def test_the_table_of_tasks_counts_their_commands():
    page = read_page("docs/tasks.md")
    table = re.findall(r"^\| \[([^\]]+)\]\(#\S+\) \| (\d+) \|", page, re.MULTILINE)
    counted = [(title, len(tasks.commands(of_task))) for title, of_task in tasks.tasks(page)]
    assert [(title, int(count)) for title, count in table] == counted and len(table) == 12


def after_serving() -> None:
    for name in ("street.json", "point.json"):
        assert isinstance(json.loads(Path(name).read_text()), dict)
    assert "opensan_requests_total" in Path("metrics.txt").read_text()


AFTER: dict[str, Callable[[], None]] = {
    "docs/first-photograph.md": after_first_photograph,
    "docs/evaluation.md": after_evaluation,
    "docs/folders.md": after_folders,
    "docs/data.md": after_data,
    "docs/own-data.md": after_own_data,
    "docs/training.md": after_training,
    "docs/huge-images.md": after_huge_images,
    "docs/video.md": after_video,
    "docs/serving.md": after_serving,
    "docs/tasks.md": after_tasks,
}
"""What must be true when a page has been followed, besides that everything on it worked."""


@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in PAGES])
def test_page_can_be_followed(page, tmp_path, small_model, capsys, monkeypatch):
    lay_out(page, tmp_path, small_model, monkeypatch)
    reader = Reader(capsys, monkeypatch)
    try:
        for block in blocks(page):
            print(f"{page}:{block.line}")
            reader.follow(block)
        AFTER.get(page, lambda: None)()
    finally:
        reader.close()


@pytest.mark.parametrize("page", PAGES)
def test_no_command_hides_in_indented_text(page):
    assert not re.findall(r"^    +(?:opensan|python|pytest|pip|make|curl) .*", read_page(page), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_in_the_text_exist(page):
    """Options that stand alone may be any command's."""
    inline = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", read_page(page))
    for code in inline:
        if code.startswith("opensan "):
            command, rest = find_command(code.split()[1:])
            assert options(rest) <= options_of(command), code
    known = set().union(*map(options_of, commands()))
    assert options(inline) <= known | ELSEWHERE


def options(words: Iterable[str]) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", " ".join(words)))


ELSEWHERE = {"--pairs", "--no-flickr", "--build", "--kills", "--minutes", "--jobs", "--rounds"}
"""Options of scripts in bench/ and of other programs that texts name."""


def anchor(heading: str) -> str:
    """As the site and code hosts make them."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read_page(page)):
        if "://" in target:
            continue
        path, _, place = target.partition("#")
        file = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert file.exists(), target
        if place:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert place in map(anchor, headings), target


def test_folders_have_the_same_names_on_all_pages():
    """Prepared data lies in prepared/, trainings in runs/, images to label in photos."""
    text = "\n".join(map(read_page, PAGES))
    prepared = re.findall(r"opensan data prepare .*(?:--out|-o) (\S+)", text)
    measured = re.findall(r"opensan eval --data (\S+)", text) + re.findall(r"\{folder: ([^,}]+)", text)
    assert {name.partition("/")[0] for name in (*prepared, *measured)} == {"prepared"}
    assert all(name.startswith("runs/") for name in re.findall(r"^out: (\S+)", text, re.MULTILINE))
    assert set(re.findall(r"opensan segment (photo\S*) ", text)) == {"photos", "photo.jpg"}


EXPLAINED = (
    *("first-photograph", "tasks", "ui", "words", "recipes", "limits"),
    *("folders", "video", "huge-images", "export", "training"),
)
"""Pages that explain the field's terms where they first stand on them."""

TERMS = {
    "CLIP": r"tells how well a text fits an?|reads? (it|words)",
    "SAN": r"Side Adapter Network|the method",
    "mask proposals": r"regions",
    "templates": r"sentences?",
}
"""A term of the field -> what must stand beside it where a page of the parts Start and Use names it first."""


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", *(f"docs/{name}.md" for name in EXPLAINED)])
def test_terms_are_explained_where_they_first_stand(page):
    paragraphs = re.sub(r"^```.*?^```$", "", read_page(page), flags=re.MULTILINE | re.DOTALL).split("\n\n")
    for term, explanation in TERMS.items():
        first = next(
            (
                text
                for text in paragraphs
                if text.strip()[:1] not in ("", "#") and re.search(rf"(?<![\w-]){term}\b(?!-)", text, re.IGNORECASE)
            ),
            None,
        )
        assert first is None or re.search(explanation, " ".join(first.split())), (term, first)


def test_the_readme_is_one_screen():
    text = read_page("README.md")
    assert len(text.splitlines()) <= 70
    assert text.count("\n```sh\n") == 2 and text.count("\n```python\n") == 1
    assert len(re.findall(r"^\| (?!use|---)", text, re.MULTILINE)) == 5


def test_the_page_about_own_data_tells_every_option():
    told = set(re.findall(r"\b([a-z]+)=[A-Z\d]", read_page("docs/own-data.md")))
    assert told == {option for reader in READERS.values() if not reader.classes for option in reader.options}


def test_the_pages_tell_every_extra_and_label_set():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    told = re.findall(
        r"`([a-z0-9-]+)`", "".join(re.findall(r"^\| `.*? \|", read_page("docs/install.md"), re.MULTILINE))
    )
    assert project["optional-dependencies"].keys() <= set(told)
    assert len(ready_sets()) == 6 and "Six label sets" in read_page("docs/words.md")


def test_the_site_builds_and_its_navigation_has_every_page(tmp_path):
    """Strictly: a link to a page or place, or a name in the reference, that does not exist is an error."""
    pytest.importorskip("zensical", reason="the extra `docs` is not installed")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "src").symlink_to(ROOT / "src")
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    named = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    for page in named:
        place = Path(page).stem.replace("index", "")
        assert (tmp_path / "out" / "site" / place / "index.html").exists(), page


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_gives(path, tmp_path, monkeypatch, capsys):
    """Made anew by `jupyter nbconvert --to notebook --execute --inplace`. Figures may differ by the machine."""
    assert path.stat().st_size < 300_000
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec(compile("".join(cell["source"]), path.name, "exec"), names)
        recorded = "".join("".join(output.get("text", "")) for output in cell["outputs"])
        assert re.sub(r"[\d.]+", "#", capsys.readouterr().out) == re.sub(r"[\d.]+", "#", recorded)
        assert {output["output_type"] for output in cell["outputs"]} <= {"stream", "execute_result"}
