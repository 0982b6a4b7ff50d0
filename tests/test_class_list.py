"""One rule for lists of classes whose lines are pixel values, wherever such a list is read."""

import numpy as np
import pytest
from PIL import Image

from opensan.cli import main
from opensan.data.class_list import read_class_list, read_class_names
from opensan.data.segmentation_folder import SegmentationFolder


@pytest.mark.parametrize(
    ("text", "names", "values"),
    [
        ("road\ncar|automobile\ntree\n", ["road", "car", "tree"], (0, 1, 2)),
        ("road # a note\ncar\n\n\n# the end\n", ["road", "car"], (0, 1)),
        ("0: road\n2: car|automobile\n3: tree\n", ["road", "car", "tree"], (0, 2, 3)),
        ("# of the street\n\n7: car\n# 8 not used\n9: tree\n", ["car", "tree"], (7, 9)),
        ("2\tcar\n1\troad\n", ["car", "road"], (2, 1)),
        ("0 road\n1 traffic light\n", ["road", "traffic light"], (0, 1)),
        ("1=road\n2 = car\n", ["road", "car"], (1, 2)),
        ("7: car\n", ["car"], (7,)),
        ("3 wheeler\n", ["3 wheeler"], (0,)),
        ("3 wheeler\ncar\n", ["3 wheeler", "car"], (0, 1)),
        ("class 0\nclass 1\n", ["class 0", "class 1"], (0, 1)),
        ("0,road\n255,car\n", ["road", "car"], (0, 255)),
        ('"road"\n"car"\n', ["road", "car"], (0, 1)),
        ('0: "road"\n2: "car"\n', ["road", "car"], (0, 2)),
        ('["road", "car"]\n', ["road", "car"], (0, 1)),
        ('{"names": [\n"road",\n"car"\n]}\n', ["road", "car"], (0, 1)),
    ],
)
def test_lists_and_their_values(tmp_path, text, names, values):
    (tmp_path / "classes.txt").write_text(text)
    listed = read_class_list(tmp_path / "classes.txt")
    assert (listed.vocabulary.names, listed.values) == (names, values)


def test_a_list_of_powershell(tmp_path):
    (tmp_path / "classes.txt").write_bytes("road\r\ncar\r\n".encode("utf-16"))
    assert read_class_list(tmp_path / "classes.txt").vocabulary.names == ["road", "car"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("road\n\ncar\n", r"classes.txt: line 2 is blank, .* \(\"0: road\"\)"),
        ("road\n# 1 not used\ncar\n", "classes.txt: line 2 is a comment, "),
        ("# my classes\nroad\n", "classes.txt: line 1 is a comment, "),
        ("   \nroad\n", "classes.txt: line 1 is blank, "),
        ("0: road\ncar\n", "line 1 has a number before the class, line 2 has none"),
        ("1: road\n1: car\n", "two classes have the number 1"),
        ("1: road\n2: Road\n", "classes.txt: word 2 'Road' repeats word 1 'road'"),
        ("road 1\ncar 0\n", r"every line has a number, .* put the number before each \(0: road\)"),
        ("name,r,g,b\nroad,1,2,3\n", "classes.txt: line 2 'road,1,2,3' is of a table"),
    ],
)
def test_a_list_that_leaves_open_which_value_is_which_is_refused(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_class_list(tmp_path / "classes.txt")
    assert "\n" not in str(caught.value)


def test_where_only_names_matter_lines_may_be_left_out(tmp_path):
    (tmp_path / "classes.txt").write_text("# of the street\nroad\n\ncar\n")
    assert read_class_names(tmp_path / "classes.txt").names == ["road", "car"]
    (tmp_path / "classes.txt").write_text("3: road\n7: car\n")
    assert read_class_names(tmp_path / "classes.txt").names == ["road", "car"]


def ready(root, classes: str, values: list[int]):
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    Image.new("RGB", (len(values), 1)).save(root / "images" / "a.png")
    Image.fromarray(np.array([values], np.uint8)).save(root / "labels" / "a.png")
    (root / "classes.txt").write_text(classes)
    (root / "val.txt").write_text("a\n")
    return root


def test_the_same_rule_holds_in_folders_that_are_trained_on_and_checked(tmp_path, capsys):
    blank = ready(tmp_path / "blank", "road\n\ncar\n", [0, 2, 255])
    with pytest.raises(ValueError, match="line 2 is blank"):
        SegmentationFolder(blank, "val")
    with pytest.raises(SystemExit):
        main(["data", "check", str(blank)])
    assert "line 2 is blank" in capsys.readouterr().err
    numbered = ready(tmp_path / "numbered", "0: road\n2: car\n", [0, 2, 255])
    assert SegmentationFolder(numbered, "val")[0][1].tolist() == [[0, 1, -1]]
    assert SegmentationFolder(numbered, "val", ignored=["road"])[0][1].tolist() == [[-1, 0, -1]]
    Image.fromarray(np.array([[0, 1, 2]], np.uint8)).save(numbered / "labels" / "a.png")
    with pytest.raises(ValueError, match=r"holds the value 1; classes.txt has 2 classes"):
        SegmentationFolder(numbered, "val")[0]


def test_a_numbered_list_prepares_the_values_it_says(tmp_path):
    root = ready(tmp_path / "raw", "0: road\n2: car\n3: tree\n", [0, 2, 3])
    with pytest.raises(SystemExit) as caught:
        main(["data", "prepare", "folder", "--source", str(root), "--out", str(tmp_path / "out")])
    assert not caught.value.code
    assert (tmp_path / "out" / "classes.txt").read_text() == "road\ncar\ntree\n"
    assert SegmentationFolder(tmp_path / "out", "val")[0][1].tolist() == [[0, 1, 2]]


def outcome(root, *options: str) -> int:
    out = root.parent / f"{root.name}-out"
    with pytest.raises(SystemExit) as caught:
        main(["data", "prepare", "folder", *options, "--source", str(root), "--out", str(out)])
    return caught.value.code or 0


def test_a_class_may_have_the_number_255(tmp_path):
    root = ready(tmp_path / "raw", "0: background\n255: lane\n", [0, 255, 255])
    assert not outcome(root)
    assert SegmentationFolder(tmp_path / "raw-out", "val")[0][1].tolist() == [[0, 1, 1]]
    assert SegmentationFolder(root, "val")[0][1].tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("classes", ["background\nlane\n", "lane\n"])
def test_masks_of_0_and_255_are_not_taken_for_unlabelled_in_silence(tmp_path, capsys, classes):
    root = ready(tmp_path / "raw", classes, [0, 255, 255])
    assert outcome(root) == 1
    assert 'number the classes in their list ("255: NAME"); if not, say first=0' in capsys.readouterr().err
    assert not outcome(root, "first=0")
    assert SegmentationFolder(tmp_path / "raw-out", "val")[0][1].tolist() == [[0, -1, -1]]
