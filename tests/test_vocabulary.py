import hashlib
import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensan.vocabulary import MAX_WORDS, TEMPLATE_SETS, Vocabulary, Word, ready_sets

# No "|": in a list of plain names it separates synonyms. White space and case are kept, but don't make a word another.
NAMES = st.lists(
    st.text(string.ascii_letters + string.digits + " ,-'é日#", min_size=1, max_size=12).filter(str.strip),
    min_size=1,
    max_size=12,
    unique_by=lambda name: " ".join(name.casefold().split()),
)


def error_of(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_comma_string_gives_classes_in_order_with_one_row_a_synonym():
    vocabulary = Vocabulary.parse("road, car|automobile |taxi,Tennis Racket", templates="single")
    assert vocabulary.names == ["road", "car", "Tennis Racket"]
    assert vocabulary.row_class == [0, 1, 1, 1, 2]
    assert vocabulary.prompts() == [
        ["a photo of a road."],
        ["a photo of a car."],
        ["a photo of a automobile."],
        ["a photo of a taxi."],
        ["a photo of a Tennis Racket."],
    ]


def test_in_a_list_a_comma_belongs_to_the_name():
    assert Vocabulary.parse(["road, route", "sky"]).names == ["road, route", "sky"]


def test_a_vocabulary_is_returned_as_it_is_unless_something_is_added():
    vocabulary = Vocabulary.parse("road, sky")
    assert Vocabulary.parse(vocabulary) is vocabulary
    more = Vocabulary.parse(vocabulary, background="other", templates="single")
    assert [word.name for word in more.words] == ["road", "sky", "other"]
    assert more.templates == TEMPLATE_SETS["single"]


def test_absorbing_words_come_last_and_are_not_named():
    spec = [{"name": "stuff", "background": True}, "road", {"name": "sky", "synonyms": ["heaven"]}]
    vocabulary = Vocabulary.parse(spec, background="other|rest")
    assert vocabulary.names == ["road", "sky"]
    assert [(word.name, word.absorbs) for word in vocabulary.words] == [
        ("road", False),
        ("sky", False),
        ("stuff", True),
        ("other", True),
    ]
    assert vocabulary.row_class == [0, 1, 1, 2, 3, 3]


def test_own_prompts_replace_the_templates_of_the_name_and_text_its_wording():
    spec = [
        {"name": "jaguar", "synonyms": ["big cat"], "prompts": ["a jaguar, the animal", "a spotted {} cat"]},
        {"name": "wall-other", "text": "wall"},
    ]
    vocabulary = Vocabulary.parse(spec, templates="single")
    assert vocabulary.names == ["jaguar", "wall-other"]
    assert vocabulary.prompts() == [
        ["a jaguar, the animal", "a spotted {} cat"],
        ["a photo of a big cat."],
        ["a photo of a wall."],
    ]


@given(NAMES)
@settings(max_examples=60, deadline=None)
def test_lists_of_names_come_back_as_given(names):
    vocabulary = Vocabulary.parse(names)
    assert vocabulary.names == names
    assert len(vocabulary.prompts()) == len(names)
    assert all(
        len(row) == 14 and all(name in sentence for sentence in row)
        for name, row in zip(names, vocabulary.prompts(), strict=True)
    )


@given(NAMES, st.data())
@settings(max_examples=60, deadline=None)
def test_json_round_trip_is_exact(names, data):
    words = []
    for name in names:
        synonyms = data.draw(st.sampled_from([(name,), (name, f"{name} /2"), (f"{name} /3",)]))
        prompts = data.draw(st.sampled_from([None, (f"one {name}", "two")]))
        words.append(Word(name, synonyms, prompts, absorbs=bool(words) and data.draw(st.booleans())))
    vocabulary = Vocabulary(tuple(words), templates=("{}", "a {} | b"))
    again = Vocabulary.parse(json.loads(json.dumps(vocabulary.to_dict())))
    assert again == vocabulary
    assert hash(again) == hash(vocabulary)


def test_words_made_of_lists_are_as_those_made_of_tuples():
    lists = Vocabulary([Word("car", ["car", "taxi"], ["a car on a road"])], ["{}", "a {}"])
    tuples = Vocabulary((Word("car", ("car", "taxi"), ("a car on a road",)),), ("{}", "a {}"))
    assert lists == tuples and hash(lists) == hash(tuples)


def test_a_name_with_a_bar_survives_the_round_trip():
    vocabulary = Vocabulary((Word("a|b"),))
    assert Vocabulary.parse(vocabulary.to_dict()) == vocabulary


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "empty"),
        ([], "empty"),
        ([{"name": "x", "background": True}], "empty"),
        ("road,,sky", "word 2 is blank"),
        ("road,sky,", "word 3 is blank"),
        (["road", " "], "word 2 is blank"),
        ("road,car||taxi", "word 2 ('car||taxi'): synonym 2 is blank"),
        ("road,sky,ROAD", "word 3 'ROAD' repeats word 1 'road'"),
        (["dining  table", "sky", "Dining Table "], "word 3 'Dining Table ' repeats word 1 'dining  table'"),
        (["caf\u00e9", "Cafe\u0301"], "word 2 'Cafe\u0301' repeats word 1 'caf\u00e9'"),
        ("road,car|Road", "word 2 'car' (synonym 'Road') repeats word 1 'road'"),
        ("car|auto|car", "word 1 ('car'): synonym 'car' stands there twice"),
        ([{"name": "x", "text": "road"}, "road"], "word 2 'road' repeats word 1 'x'"),
        ([{"name": "x", "prompts": ["a", ""]}], "a prompt is blank"),
        (["road", 5], "word 2 is 5"),
        ([{"nam": "road"}], "unknown key 'nam'"),
        ([{"name": 5}], 'word 1 needs a "name"'),
        ([{"name": "road", "synonyms": "street"}], '"synonyms" must be a list'),
        ([{"name": "road", "background": "yes"}], '"background" must be true or false'),
        ({"words": ["road"], "colour": 1}, "unknown key 'colour'"),
        ({"words": "road"}, '"words" must be a list'),
        ({"words": ["road"], "templates": "/etc/hostname"}, "templates"),
        ({"road", "sky"}, "not set"),
        (None, "not NoneType"),
        (["road\x1b[2J"], "control character"),
        (["road\n", "sky\n"], "word 1 ('road\\n') has a line break"),
        ("road\tstreet", "control character"),
        ([{"name": "road", "synonyms": ["high\u2028street"]}], "a synonym"),
        (["\udcff"], "not valid text"),
        (
            [str(number) for number in range(MAX_WORDS + 1)],
            "65,535 words are too many: a label map holds at most 65,534",
        ),
    ],
)
def test_bad_words_get_one_line(spec, says):
    assert says in error_of(lambda: Vocabulary.parse(spec))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('["night sky", "brick"]', ["night sky", "brick"]),
        ("['night sky', \"rock 'n' roll\"]", ["night sky", "rock 'n' roll"]),
        ("('road', 'car')", ["road", "car"]),
        ('["road, route", {"name": "car"}]', ["road, route", "car"]),
        ("road; car", ["road", "car"]),
        ("道路、车，天空", ["道路", "车", "天空"]),
        ("دارة، سيارة", ["دارة", "سيارة"]),
        ("road\ncar\r\n\nsky\n", ["road", "car", "sky"]),
        ("road,\ncar,\nsky", ["road", "car", "sky"]),
        ('"road, route", car', ["road, route", "car"]),
        ("“road”, ‘car’, 'sky', `sea`", ["road", "car", "sky", "sea"]),
        ('"a, b"; c', ["a, b", "c"]),
        ("\ufeffroad, c\u00adar\u200b", ["road", "car"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),  # a joiner that Persian needs
        (
            "12\" pipe, '57 Chevy, 24/7, 3D model, (old) church",
            ['12" pipe', "'57 Chevy", "24/7", "3D model", "(old) church"],
        ),
    ],
)
def test_text_lists_words_as_people_write_them(text, names):
    assert Vocabulary.parse(text).names == names
    assert [word.name for word in Vocabulary.parse(["x"], background=text).words[1:]] == names


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("road, route; car", "has commas and semicolons"),
        ("[night sky, brick]", "begins like a list and is none"),
        ("['road'", "begins like a list and is none"),
        ("('road'", "begins like a list and is none"),
        ("[" * 100_000, "begins like a list and is none"),
        ('{"road", "car"}', "begins like a list and is none"),
        ('["road", 5]', "word 2 is 5: a word is text"),
        ('{"road": 0, "car": 1}', "unknown key 'road'"),
        ("words.txt", "looks like a file: give it as --words-file"),
        (r"C:\data\words", "looks like a file"),
        ("../words", "looks like a file"),
        ("0: road, 1: car", "word 1 '0: road' has a number"),
        ("road=0, car=1", "word 1 'road=0' has a number"),
        ("1. road\n2. car", "word 1 '1. road' has a number"),
        ("- road\n- car", "begins with '-'"),
        ('"road, car"', "all words stand in one pair of quotation marks"),
        ("'road, car'", "all words stand in one pair of quotation marks"),
        ('"road, car', "none ends it"),
        ('"big" road, car', "quotation marks inside"),
        ("road, \u200b, car", "word 2 is blank"),
        ("\u200b", "empty"),
        ("road;;car", "word 2 is blank"),
        (r"road\nsky", "has a backslash: separate words by commas"),  # typed in a shell
        ("road&amp;sky", "is text of a web page's source: write 'road&sky'"),
        ('["road" "sky"]', "begins like a list and is none"),  # Python would join them
    ],
)
def test_text_that_is_no_clear_list_is_refused(text, says):
    assert says in error_of(lambda: Vocabulary.parse(text))


def test_text_may_be_a_whole_vocabulary():
    vocabulary = Vocabulary.parse('{"words": ["road"], "background": ["sky"]}')
    assert [(word.name, word.absorbs) for word in vocabulary.words] == [("road", False), ("sky", True)]


def test_in_a_list_each_text_is_a_word_whatever_it_holds():
    names = ["a; b", "words.txt", "0: road", '"quoted"', "- x", "道、路"]
    vocabulary = Vocabulary.parse(names)
    assert vocabulary.names == names
    assert Vocabulary.parse(vocabulary.to_dict()) == vocabulary


def test_a_single_text_is_no_list_of_synonyms():
    assert "synonyms of 'vehicle' must be a list of texts, not 'car'" in error_of(lambda: Word("vehicle", "car"))
    assert "prompts of 'vehicle'" in error_of(lambda: Word("vehicle", ("car",), "a car"))


def test_words_that_look_alike_are_repetitions():
    assert error_of(lambda: Vocabulary.parse(["road", "ro\u200bad"])) == "word 2 'road' repeats word 1 'road'"


def test_words_that_tokens_tell_apart_are_no_repetition():
    assert Vocabulary.parse("Maße, Masse").names == ["Maße", "Masse"]


def test_background_that_repeats_a_word_is_an_error():
    message = error_of(lambda: Vocabulary.parse("road,sky", background=["other", "Sky"]))
    assert message == "background word 2 'Sky' repeats word 2 'sky'"


@pytest.mark.parametrize(
    ("templates", "says"),
    [
        ("vlid", "unknown template set 'vlid': choose"),
        ("a {} here.", "unknown template set"),
        ("missing.txt", "missing.txt: can't be read"),
        ([], "no prompt templates"),
        (["a photo"], "template 1 'a photo' must hold \"{}\" exactly once"),
        (["{}", "{} and {}"], "template 2"),
        (["{}", "a {}", "{}"], "template 3 '{}' repeats template 1"),
        (5, "templates must be"),
    ],
)
def test_bad_templates_get_one_line(templates, says):
    assert says in error_of(lambda: Vocabulary.parse("road", templates=templates))


def test_templates_from_a_file_and_braces_are_plain_text(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# mine\na {} {0} at night\n\n{}\n")
    for spec in (path, str(path)):
        assert Vocabulary.parse("car", templates=spec).prompts() == [["a car {0} at night", "car"]]


def test_text_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes("\ufeff# streets\r\nroad, route\r\n\r\ncar|taxi  # vehicles\r\nC# book\r\n".encode())
    vocabulary = Vocabulary.from_file(path)
    assert vocabulary.names == ["road, route", "car", "C# book"]
    assert vocabulary.words[1].synonyms == ("car", "taxi")
    assert Vocabulary.parse(path, background="other").words[-1] == Word("other", absorbs=True)


def test_text_files_of_windows(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes("road\r\nStraße\r\n".encode("utf-16"))  # PowerShell's ">", with its mark
    assert Vocabulary.from_file(path).names == ["road", "Straße"]


def test_yaml_files(tmp_path):
    path = tmp_path / "words.yaml"
    for text in ("- road, route\n- {name: car, synonyms: [taxi]}\n", "words: ['road, route', car|taxi]\n"):
        path.write_text(text)
        assert Vocabulary.from_file(path).row_class == [0, 1, 1]
    path.write_text("train: images\nnames:\n  0: road\n  1: car\n")  # YOLO's data.yaml
    assert Vocabulary.from_file(path).names == ["road", "car"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("words.yaml", "- road\n- no\n", "word 2 is False: a word is text, or in quotation marks"),
        ("words.yaml", "names: {1: road, 2: car}\n", "numbers are not 0, 1, 2"),
        ("words.yaml", "[" * 100_000, "not valid YAML"),
        ("words.yaml", "- !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("words.yaml", "a: &a [x, x]\nb: &b [*a, *a]\nnames: [*b, *b]\n", "word 1 is"),
        ("words.txt", "- road\n- car\n", "line 1 '- road' begins with '-'"),
        ("words.txt", "road, car, sky\n", "has commas, which belong to a name: put each word on a line"),
        ("words.txt", "road\ncar; sky\n", "line 2 'car; sky' has ';'"),
        ("words.txt", "0: road\n1: car\n", "line 1 '0: road' has a number"),
        ("words.txt", "0 road\n1 sky\n", "every line has a number, as line 1 '0 road'"),
        ("words.txt", "# counts\nroad 120\nsky 33\n", "every line has a number, as line 2 'road 120'"),
        ("words.txt", "road\t0\nsky\t1\n", "is of a table"),
        ("words.txt", "name,r,g,b\nroad,128,64,128\n", "line 2 'road,128,64,128' is of a table"),
        ("words.txt", "road,\nsky\n", "line 1 'road,' ends with a comma"),
        ("words.csv", "id,name\n0,road\n", "line 1 'id,name' is of a table"),
        ("words.csv", "name\nroad\n", "line 1 'name' is a heading"),
    ],
)
def test_word_files_that_are_no_clear_list_are_refused(tmp_path, name, text, says):
    path = tmp_path / name
    path.write_text(text)
    message = error_of(lambda: Vocabulary.from_file(path))
    assert says in message and message.startswith(str(path))


def test_quotation_marks_around_a_line_are_left_out(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text('"road"\n\'sky; blue\'\n12" pipe\nclass 0\nclass 1\n')
    assert Vocabulary.from_file(path).names == ["road", "sky; blue", '12" pipe', "class 0", "class 1"]


def test_json_in_a_text_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text('["road, route",\n "car"]')
    assert Vocabulary.from_file(path).names == ["road, route", "car"]


def test_text_file_errors_name_the_line(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("# comment\nroad\n\nsky\nRoad\n")
    assert error_of(lambda: Vocabulary.from_file(path)) == f"{path}: line 5 'Road' repeats line 2 'road'"


def test_json_files(tmp_path):
    path = tmp_path / "words.json"
    path.write_text(json.dumps(["road, route", {"name": "car", "synonyms": ["taxi"]}]))
    assert Vocabulary.from_file(path).row_class == [0, 1, 1]
    path.write_text(json.dumps({"words": ["road"], "background": ["other"], "templates": ["{}!"]}))
    vocabulary = Vocabulary.from_file(path)
    assert vocabulary.prompts() == [["road!"], ["other!"]]
    assert vocabulary.names == ["road"]
    assert Vocabulary.from_file(path, templates="single").templates == TEMPLATE_SETS["single"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"# nothing\n", "empty"),
        (b"stra\xdfe\n", "not UTF-8 text"),
        (b"road\x00sky", "binary"),
        (b"x" * (32 * 2**20 + 1), "longer than 32 MiB"),
    ],
)
def test_unreadable_word_files_get_one_line(tmp_path, content, says):
    path = tmp_path / "words.txt"
    path.write_bytes(content)
    message = error_of(lambda: Vocabulary.from_file(path))
    assert says in message
    assert str(path) in message


@pytest.mark.parametrize("content", ["[1", "[" * 100_000, "{}", "5", '[["road"]]'])
def test_bad_json_files_get_one_line(tmp_path, content):
    path = tmp_path / "words.json"
    path.write_text(content)
    assert str(path) in error_of(lambda: Vocabulary.from_file(path))


def test_folders_and_missing_files(tmp_path):
    assert "can't be read" in error_of(lambda: Vocabulary.from_file(tmp_path))
    assert "No such file" in error_of(lambda: Vocabulary.from_file(tmp_path / "none.txt"))


def test_ready_sets_are_the_six_benchmarks_in_training_order():
    sizes = {name: len(Vocabulary.ready(name).names) for name in ready_sets()}
    assert sizes == {
        "ade20k_150": 150,
        "ade20k_847": 847,
        "coco_stuff_171": 171,
        "pascal_context_459": 459,
        "pascal_context_59": 59,
        "pascal_voc_20": 20,
    }
    assert Vocabulary.ready("coco_stuff_171").names[0] == "person"
    assert Vocabulary.ready("coco_stuff_171", background="other").words[-1].absorbs
    assert "coco_stuff_171" in error_of(lambda: Vocabulary.ready("../secret"))


def test_fifty_thousand_words():
    names = [f"thing {number}, type {number % 7}" for number in range(50_000)]
    vocabulary = Vocabulary.parse(names)
    assert vocabulary.names == names
    assert vocabulary.row_class[-1] == 49_999
    assert "word 50001 'Thing 3, type 3' repeats word 4" in error_of(
        lambda: Vocabulary.parse([*names, "Thing 3, type 3"])
    )


def test_vild_templates_are_those_of_the_official_code():
    # sha256 of the 14 strings as JSON, taken from the training golden's "templates".
    digest = hashlib.sha256(json.dumps(TEMPLATE_SETS["vild"]).encode()).hexdigest()
    assert digest == "63b27837eba48c3dfe4f0e396b64660e78ff5c55007a6e1697771d03af03bb0d"
