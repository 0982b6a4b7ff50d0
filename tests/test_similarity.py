"""Similarity of label sets: against loops over known rows, and what the command says and refuses."""

import json

import numpy as np
import pytest
from PIL import Image

from opensan.evaluation.similarity import Similarity, compare, heat_map
from opensan.vocabulary import Vocabulary


class Rows:
    """A text half whose rows are given by text."""

    def __init__(self, rows: dict[str, np.ndarray]) -> None:
        self._rows = rows

    def rows(self, vocabulary: Vocabulary) -> np.ndarray:
        texts = [text for word in vocabulary.words for text in word.synonyms]
        return np.stack([self._rows[text] / np.linalg.norm(self._rows[text]) for text in texts])


FIRST, SECOND = "car|auto,tree,sky", "road|street|way,auto,water,cloud"


@pytest.fixture
def text() -> Rows:
    generator = np.random.default_rng(3)
    names = {part for words in (FIRST, SECOND) for word in words.split(",") for part in word.split("|")}
    return Rows({name: generator.standard_normal(6) for name in sorted(names)})


def test_figures_are_those_of_loops(text):
    first, second = Vocabulary.parse(FIRST), Vocabulary.parse(SECOND)
    result = compare(text, first, second)

    def cosine(one, other) -> float:
        return max(
            float(text._rows[a] @ text._rows[b] / np.linalg.norm(text._rows[a]) / np.linalg.norm(text._rows[b]))
            for a in one.synonyms
            for b in other.synonyms
        )

    of_first = [max(cosine(one, other) for other in second.words) for one in first.words]
    of_second = [max(cosine(one, other) for one in first.words) for other in second.words]
    assert result.directed == pytest.approx((1 - min(of_first), 1 - min(of_second)))
    assert result.hausdorff == pytest.approx(1 - min(of_first + of_second))
    assert result.mean_best == pytest.approx((np.mean(of_first), np.mean(of_second)))
    assert of_first[0] == pytest.approx(1), "the synonym auto is a word of the other set"
    far = result.farthest(2)
    assert [one.word for one in far[0]] == [first.names[index] for index in np.argsort(of_first)[:2]]
    assert far[1][0].word == second.names[int(np.argmin(of_second))]
    assert far[1][0].cosine == pytest.approx(min(of_second))


def test_a_set_is_at_no_distance_from_itself(text):
    same = compare(text, Vocabulary.parse(FIRST), Vocabulary.parse(FIRST))
    assert same.hausdorff == pytest.approx(0, abs=1e-6) and same.mean_best == pytest.approx((1, 1))


def test_a_set_that_is_a_part_is_near_one_way_only(text):
    part = compare(text, Vocabulary.parse("car,tree"), Vocabulary.parse("car,tree,sky"))
    assert part.directed[0] == pytest.approx(0, abs=1e-6) and part.directed[1] > 0.1


@pytest.mark.parametrize("size", [(3, 5), (171, 847)])
def test_the_heat_map_is_dark_where_words_are_alike(size):
    cosines = np.full(size, 0.1, np.float32)
    cosines[2, 1] = 0.9
    names = tuple([f"word {number}" for number in range(count)] for count in size)
    drawn = heat_map(Similarity(names, cosines))
    assert max(drawn.size) < 2_000
    assert (np.asarray(drawn)[:, -8:] == 255).all(), "nothing reaches the edge, the legend included"
    pixels = np.asarray(drawn).astype(int)
    dark = np.argwhere((pixels == (20, 60, 130)).all(axis=2))
    light = np.argwhere((pixels == (247, 247, 250)).all(axis=2))
    assert len(dark) and len(light) == len(dark) * (cosines.size - 1)
    cell = round(len(dark) ** 0.5)
    assert tuple((dark.min(axis=0) - light.min(axis=0)) // cell) == (2, 1)


def test_the_command(tmp_path, model_folder, run):
    (tmp_path / "mine.txt").write_text("red car\nblue sky\ngrass\n")
    command = ("similarity", "pascal_voc_20", tmp_path / "mine.txt", "--model", model_folder)
    code, out, err = run(*command, "-o", tmp_path / "map.png", "--farthest", 2)
    assert code == 0, err
    assert out.startswith("Hausdorff distance 0.") and out.count("(nearest: ") == 4
    with Image.open(tmp_path / "map.png") as drawn:
        assert drawn.format == "PNG"
    code, out, err = run(*command, "-o", tmp_path / "map.png", "--json")
    assert code == 0, err
    plain = json.loads(out)
    assert plain["words"] == [20, 3] and plain["hausdorff"] == max(plain["directed"])
    assert plain["farthest"][1][0]["word"] in ("red car", "blue sky", "grass")


def test_what_cannot_be_compared_is_one_line(tmp_path, model_folder, run):
    (tmp_path / "one.txt").write_text("car\n")
    for arguments, problem in (
        (("pascal_voc_20", tmp_path / "one.txt"), "one.txt: has one word, and a set to compare has at least 2"),
        (("pascal_voc_20", "nowhere.txt"), "nowhere.txt: no such file, nor a ready set (ade20k_150"),
        (("pascal_voc", "ade20k_150"), "did you mean 'pascal_voc_20'"),
        (("pascal_voc_20", "ade20k_150", "-o", tmp_path / "map.jpg"), "map.jpg: the heat map is a .png"),
    ):
        code, _, err = run("similarity", *arguments, "--model", model_folder)
        assert code == 1 and problem in err and err.count("\n") == 1, err
