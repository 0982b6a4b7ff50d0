import copy
import functools
import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from opensan.text.cache import TextCache, default_folder
from opensan.text.encoder import TextEncoder, pad_tokens, tokenize
from opensan.text.prompt_tree import prompt_trees
from opensan.text.tokenizer import clip_tokenizer
from opensan.vocabulary import Vocabulary

from .conftest import lively_model

GOLDENS = Path(__file__).parent / "goldens"
WORDS = "road, car|automobile|taxi, adding machine, Tennis Racket, sky"


class Counting:
    """A SAN that counts what its text tower is given."""

    def __init__(self, model):
        self.clip, self.config, self._model = model.clip, model.config, model
        self.prompts = 0
        self.tokens = 0

    def embed_prompt_tree(self, tree):
        self.prompts += len(tree.ends)
        self.tokens += len(tree.tokens)
        return self._model.embed_prompt_tree(tree)

    def embed_prompts(self, tokens):
        return self._model.embed_prompts(tokens)


@pytest.fixture(autouse=True)
def _no_surprising_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def plain_rows(model, vocabulary):
    """The definition: every prompt alone at the full context length, mean of unit rows, unit again."""
    rows = []
    for texts in vocabulary.prompts():
        embeddings = []
        for text in texts:
            tokens = torch.zeros(1, model.config.clip.text.context_length, dtype=torch.int64)
            found = torch.tensor(tokenize(text))
            tokens[0, : len(found)] = found
            embeddings.append(model.embed_prompts(tokens)[0])
        rows.append(F.normalize(torch.stack(embeddings).mean(0), dim=0))
    return torch.stack(rows)


TRICKY = ["it's", "<end_of_text>", "&amp;amp;", "ABC12", "Ünïcöde", "\u6f22\u5b57", "..."]


@functools.cache
def open_clip_tokenizer():
    return pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()


@settings(deadline=None)
@given(st.text() | st.text(st.characters(max_codepoint=127)) | st.lists(st.sampled_from(TRICKY)).map(" ".join))
def test_the_tokenizer_is_open_clips(text):
    assert clip_tokenizer().encode(text) == open_clip_tokenizer().encode(text)


def test_tokens_are_the_official_ones():
    texts = json.loads((GOLDENS / "train_tiny.json").read_text())["token_texts"]
    golden = torch.from_numpy(np.load(GOLDENS / "train_tiny.npz")["tokens"])
    prompts = [tokenize(text) for text in texts]
    assert sum(len(prompt) > 77 for prompt in prompts) == 1  # the official tokenizer cuts that one
    cut = [prompt if len(prompt) <= 77 else [*prompt[:76], prompt[-1]] for prompt in prompts]
    assert torch.equal(pad_tokens(cut), golden)


@torch.no_grad()
def test_rows_are_normalised_means_of_unit_prompt_embeddings(small_model):
    vocabulary = Vocabulary.parse(
        [
            *WORDS.split(", "),
            {"name": "jaguar", "synonyms": ["big cat"], "prompts": ["one", "a much longer second one"]},
        ],
        background="other",
    )
    text = TextEncoder(small_model, disk_cache=False).classifier(vocabulary)
    assert text.num_classes == 7
    assert text.row_class.tolist() == [0, 1, 1, 1, 2, 3, 4, 5, 5, 6]
    assert text.rows.dtype == torch.float32
    torch.testing.assert_close(text.rows, plain_rows(small_model, vocabulary), rtol=0, atol=1e-6)


def test_equal_prompts_and_equal_beginnings_are_embedded_once(small_model):
    model = Counting(small_model)
    spec = [{"name": name, "text": f"{name} it", "prompts": ["the same", "THE  same", name]} for name in ("a", "b")]
    TextEncoder(model, disk_cache=False).classifier(Vocabulary.parse(spec))
    # start of text; the, same, end; a, end; b, end
    assert (model.prompts, model.tokens) == (3, 8)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 3), max_size=5).map(lambda middle: (0, *middle, 9)), min_size=1),
    st.integers(1, 12),
)
def test_prompt_trees_hold_every_prompt_in_order(prompts, most):
    held = []
    for tree in prompt_trees(prompts, most):
        assert len(tree.tokens) <= most or len(tree.ends) == 1
        # Equal beginnings are one node: no two nodes see the same tokens.
        assert len({tuple(tree.tokens[row].tolist()) for row in tree.sees}) == len(tree.tokens)
        for end in tree.ends:
            seen = tree.sees[end].nonzero()[0]
            assert tree.depth[seen].tolist() == list(range(len(seen)))
            held.append(tuple(tree.tokens[seen].tolist()))
    assert held == prompts


@torch.no_grad()
@pytest.mark.parametrize("most", [1, 7, 1000])
def test_a_tree_answers_as_its_prompts_do_alone(small_model, most):
    prompts = sorted(tuple(tokenize(text)) for row in Vocabulary.parse(WORDS).prompts() for text in row)
    trees = [small_model.embed_prompt_tree(tree.to("cpu")) for tree in prompt_trees(prompts, most)]
    torch.testing.assert_close(torch.cat(trees), small_model.embed_prompts(pad_tokens(prompts)), rtol=0, atol=1e-6)


def test_a_bidirectional_tower_is_never_read_through_the_prompt_tree(small_config):
    """There, a token's output depends on what follows it: through a tree, rows are silently wrong."""
    clip = small_config.clip
    both_ways = clip.model_copy(update={"text": clip.text.model_copy(update={"causal": False})})
    model = lively_model(small_config.model_copy(update={"clip": both_ways}))
    counting = Counting(model)
    vocabulary = Vocabulary.parse(WORDS)
    rows = TextEncoder(counting, disk_cache=False).rows(vocabulary)
    assert counting.prompts == 0
    torch.testing.assert_close(torch.from_numpy(rows), plain_rows(model, vocabulary), atol=1e-5, rtol=1e-5)
    through_trees = TextEncoder(model, disk_cache=False)
    model.clip.causal_text = through_trees.causal = True
    assert abs(through_trees.rows(vocabulary) - rows).max() > 1e-3, "the trap would have been noticed"


def test_asking_again_runs_nothing_and_a_new_word_only_itself(small_model, tmp_path):
    model = Counting(small_model)
    encoder = TextEncoder(model, disk_cache=False)
    first = encoder.classifier(Vocabulary.parse(WORDS, templates="single"))
    assert model.prompts == 7
    assert encoder.classifier(Vocabulary.parse(WORDS, templates="single")) is first
    encoder.classifier(Vocabulary.parse(f"tree, {WORDS}", templates="single"))
    assert model.prompts == 8


def test_the_disk_cache_answers_exactly_what_was_computed(small_model, tmp_path):
    vocabulary = Vocabulary.parse(WORDS)
    first = TextEncoder(small_model, cache_dir=tmp_path).classifier(vocabulary)
    model = Counting(small_model)
    second = TextEncoder(model, cache_dir=tmp_path).classifier(vocabulary)
    assert model.prompts == 0
    assert torch.equal(first.rows, second.rows)
    TextEncoder(model, cache_dir=tmp_path).classifier(Vocabulary.parse(WORDS, templates="single"))
    assert model.prompts == 7


def test_the_cache_is_where_the_environment_says_and_nowhere_without(small_model, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENSAN_CACHE", str(tmp_path / "mine"))
    TextEncoder(small_model, disk_cache=False).classifier(Vocabulary.parse("road"))
    assert not (tmp_path / "mine").exists()
    TextEncoder(small_model).classifier(Vocabulary.parse("road"))
    assert len(list((tmp_path / "mine" / "text").iterdir())) == 1
    monkeypatch.delenv("OPENSAN_CACHE")
    assert default_folder().parent.name == "opensan"


def test_other_weights_get_other_rows_even_in_the_same_object(small_model, tmp_path):
    model = copy.deepcopy(small_model)
    encoder = TextEncoder(model, cache_dir=tmp_path)
    vocabulary = Vocabulary.parse(WORDS)
    before = encoder.classifier(vocabulary).rows
    with torch.no_grad():
        model.clip.ln_final.weight[0] += 1
    after = encoder.classifier(vocabulary).rows
    with torch.no_grad():
        torch.testing.assert_close(after, plain_rows(model, vocabulary), rtol=0, atol=1e-6)
    assert (before - after).abs().max() > 1e-3


def test_narrow_weights_do_not_mix_with_float32(small_model, tmp_path):
    vocabulary = Vocabulary.parse(WORDS)
    exact = TextEncoder(small_model, cache_dir=tmp_path).classifier(vocabulary).rows
    narrow_model = Counting(copy.deepcopy(small_model).bfloat16())
    narrow = TextEncoder(narrow_model, cache_dir=tmp_path).classifier(vocabulary).rows
    assert narrow_model.prompts > 0
    assert narrow.dtype == torch.float32
    assert 0 < (exact - narrow).abs().max() < 0.05


def test_activation_is_part_of_the_key_though_no_weight_shows_it(small_model, tmp_path):
    TextEncoder(small_model, cache_dir=tmp_path).classifier(Vocabulary.parse("road"))
    other = Counting(small_model)
    clip = small_model.config.clip.model_copy(update={"quick_gelu": False})
    other.config = small_model.config.model_copy(update={"clip": clip})
    TextEncoder(other, cache_dir=tmp_path).classifier(Vocabulary.parse("road"))
    assert other.prompts > 0


def cache_file(folder: Path) -> Path:
    (path,) = folder.glob("*.sqlite")
    return path


def cut(path):
    path.write_bytes(path.read_bytes()[:-3000])


def cut_off_a_page(path):
    path.write_bytes(path.read_bytes()[:-4096])


def cut_in_the_header(path):
    path.write_bytes(path.read_bytes()[:50])


def replace(path):
    path.write_bytes(b"this is no database at all, but long enough to be one" * 100)


def another_table(path):
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE embeddings (a, b)")


def change_rows(change):
    def damage(path):
        with sqlite3.connect(path) as database:
            for key, row in database.execute("SELECT key, row FROM embeddings").fetchall():
                database.execute("UPDATE embeddings SET row = ? WHERE key = ?", (change(row), key))

    return damage


def with_right_checksum(change):
    def damage(path):
        with sqlite3.connect(path) as database:
            for key, row in database.execute("SELECT key, row FROM embeddings").fetchall():
                checksum = hashlib.blake2b(key + change(row), digest_size=16).digest()
                database.execute(
                    "UPDATE embeddings SET row = ?, checksum = ? WHERE key = ?", (change(row), checksum, key)
                )

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        cut_off_a_page,
        cut_in_the_header,
        replace,
        another_table,
        change_rows(lambda row: bytes([row[0] ^ 1]) + row[1:]),
        change_rows(lambda row: "text"),
        with_right_checksum(lambda row: row[:-4]),
        with_right_checksum(lambda row: np.float32(np.nan).tobytes() + row[4:]),
    ],
    ids=["cut", "page", "header", "replaced", "another-table", "flipped-bit", "text", "dimension", "nan"],
)
def test_a_damaged_cache_is_rebuilt_with_one_warning(small_model, tmp_path, damage):
    vocabulary = Vocabulary.parse(WORDS, templates="single")
    expect = TextEncoder(small_model, cache_dir=tmp_path).classifier(vocabulary).rows
    damage(cache_file(tmp_path))
    with pytest.warns(RuntimeWarning, match="text cache .*sqlite") as caught:
        found = TextEncoder(small_model, cache_dir=tmp_path).classifier(vocabulary).rows
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert torch.equal(found, expect)
    model = Counting(small_model)
    assert torch.equal(TextEncoder(model, cache_dir=tmp_path).classifier(vocabulary).rows, expect)
    assert model.prompts == 0


def test_bytes_flipped_anywhere_never_reach_an_answer(tmp_path):
    generator = np.random.default_rng(0)
    rows = {bytes([n]) * 32: generator.normal(size=8).astype(np.float32) for n in range(50)}
    cache = TextCache(tmp_path, "tower", 8)
    cache.write(rows)
    good = cache.path.read_bytes()
    for _ in range(150):
        data = np.frombuffer(good, np.uint8).copy()
        data[generator.integers(0, len(data), 8)] ^= generator.integers(1, 256, 8).astype(np.uint8)
        cache.path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = cache.read(list(rows))
            assert all(np.array_equal(row, rows[key]) for key, row in found.items())
            cache.write(rows)
            found = cache.read(list(rows))
            assert all(np.array_equal(row, rows[key]) for key, row in found.items())


def test_without_a_writable_folder_it_works_and_warns_once(small_model, tmp_path):
    (tmp_path / "file").touch()
    encoder = TextEncoder(small_model, cache_dir=tmp_path / "file" / "cache")
    with pytest.warns(RuntimeWarning, match="can't be used") as caught:
        found = encoder.classifier(Vocabulary.parse(WORDS)).rows
        encoder.classifier(Vocabulary.parse("tree"))
    assert len(caught) == 1
    assert torch.equal(found, TextEncoder(small_model, disk_cache=False).classifier(Vocabulary.parse(WORDS)).rows)


WRITER = """
import sys, warnings
from pathlib import Path
import numpy as np
from opensan.text import cache as text_cache
from opensan.text.cache import TextCache
warnings.simplefilter("error")
text_cache.MAX_BYTES = int(sys.argv[3])
cache = TextCache(Path(sys.argv[1]), "tower", 64)
print("ready", flush=True)
sys.stdin.readline()
for batch in range(int(sys.argv[2])):
    keys = [f"{batch:05d} {n:026d}".encode() for n in range(16)]
    rows = {key: np.random.default_rng(list(key)).normal(size=64).astype(np.float32) for key in keys}
    found = cache.read(keys)
    assert all(np.array_equal(found[key], rows[key]) for key in found)
    cache.write(rows)
    print(batch, flush=True)
"""


def start_writer(folder: Path, batches: int, limit: int = 2**30) -> subprocess.Popen:
    arguments = [sys.executable, "-c", WRITER, folder, str(batches), str(limit)]
    writer = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "ready\n"
    return writer


def go(writer: subprocess.Popen) -> None:
    writer.stdin.write("go\n")
    writer.stdin.flush()


def test_two_processes_write_the_same_cache_at_once(tmp_path):
    writers = [start_writer(tmp_path, 40) for _ in range(2)]
    for writer in writers:
        go(writer)
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    keys = [f"{batch:05d} {n:026d}".encode() for batch in range(40) for n in range(16)]
    found = TextCache(tmp_path, "tower", 64).read(keys)
    assert len(found) == len(keys)
    expect = np.random.default_rng(list(keys[-1])).normal(size=64).astype(np.float32)
    np.testing.assert_array_equal(found[keys[-1]], expect)


def test_processes_that_share_a_full_cache(tmp_path):
    limit = 60_000
    writers = [start_writer(tmp_path, 60, limit) for _ in range(2)]
    for writer in writers:
        go(writer)
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    keys = [f"{batch:05d} {n:026d}".encode() for batch in range(60) for n in range(16)]
    assert 16 <= len(TextCache(tmp_path, "tower", 64).read(keys)) < len(keys) / 2
    assert cache_file(tmp_path).stat().st_size < 1.5 * limit


def test_what_was_used_longest_ago_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr("opensan.text.cache.MAX_BYTES", 60_000)
    days = [[f"{day} {n}".encode() for n in range(16)] for day in range(40)]
    row = np.ones(64, np.float32)
    cache = TextCache(tmp_path, "tower", 64)
    for day, keys in enumerate(days):
        monkeypatch.setattr("opensan.text.cache._today", lambda day=day: day)
        cache.write(dict.fromkeys(keys, row))
        assert len(cache.read(days[0])) == 16
        assert len(cache.read(keys)) == 16
    kept = [len(cache.read(keys)) for keys in days]
    assert kept[1:] == sorted(kept[1:]) and kept[1] == 0 and sum(kept) > 60
    assert cache.path.stat().st_size < 80_000


def test_the_tower_used_longest_ago_goes_first(tmp_path, monkeypatch):
    row = np.ones(1024, np.float32)
    caches = [TextCache(tmp_path, name, 1024) for name in ("a", "b", "c")]
    for hours, cache in zip((2, 3, 1), caches, strict=True):
        cache.write({bytes([n]): row for n in range(4)})
        os.utime(cache.path, (time.time() - 3600 * hours,) * 2)
    (tmp_path / "mine.sqlite").write_bytes(bytes(100_000))
    limit = sum(cache.path.stat().st_size for cache in caches)
    monkeypatch.setattr("opensan.text.cache.MAX_BYTES", limit)
    fourth = TextCache(tmp_path, "d", 1024)
    fourth.write({b"": row})
    assert [cache.path.exists() for cache in [*caches, fourth]] == [True, False, True, True]
    assert (tmp_path / "mine.sqlite").exists()


def test_a_writer_killed_midway_leaves_a_sound_cache(tmp_path):
    generator = np.random.default_rng(3)
    for _ in range(3):
        writer = start_writer(tmp_path, 100_000)
        go(writer)
        writer.stdout.readline()
        time.sleep(generator.uniform(0.0, 0.2))
        os.kill(writer.pid, signal.SIGKILL)
        done = [int(line) for line in writer.communicate()[0].split()]
        keys = [f"{batch:05d} {n:026d}".encode() for batch in done for n in range(16)]
        assert len(TextCache(tmp_path, "tower", 64).read(keys)) == len(keys)


def test_one_object_serves_threads(small_model, tmp_path):
    model = Counting(small_model)
    encoder = TextEncoder(model, cache_dir=tmp_path)
    vocabularies = [Vocabulary.parse(f"{WORDS}, thing {n % 3}", templates="single") for n in range(24)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(encoder.classifier, vocabularies))
    assert model.prompts == 7 + 3
    for vocabulary, text in zip(vocabularies, found, strict=True):
        expect = TextEncoder(small_model, cache_dir=tmp_path).classifier(vocabulary)
        assert torch.equal(text.rows, expect.rows)


@pytest.mark.parametrize("disk_cache", [True, False])
def test_rows_made_in_inference_mode_or_autocast_serve_training(small_model, disk_cache):
    vocabulary = Vocabulary.parse(WORDS)
    expect = TextEncoder(small_model, disk_cache=False).classifier(vocabulary).rows
    for _ in range(2):  # computed, then read
        encoder = TextEncoder(small_model, disk_cache=disk_cache)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            text = encoder.classifier(vocabulary)
        weight = torch.ones(len(text.rows), requires_grad=True)
        (weight @ text.rows).sum().backward()
        torch.testing.assert_close(weight.grad, expect.sum(1))
        assert torch.equal(text.rows, expect)


def test_an_over_long_prompt_is_refused_before_any_work(small_model):
    model = Counting(small_model)
    words = [*(f"word {n}" for n in range(600)), "so " * 71]
    with pytest.raises(ValueError, match=r"^word 'so so ") as caught:
        TextEncoder(model, disk_cache=False).classifier(Vocabulary.parse(words, templates="single"))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    assert "has 78 tokens, and this model reads at most 77" in message
    assert model.prompts == 0
    fits = Vocabulary.parse(["so " * 70], templates="single")
    assert TextEncoder(model, disk_cache=False).classifier(fits).rows.shape == (1, 24)


def test_a_monstrous_word_is_refused_unread(small_model):
    with pytest.raises(ValueError, match="has 5,000,014 characters"):
        TextEncoder(small_model, disk_cache=False).classifier(Vocabulary.parse("x" * 5_000_000, templates="single"))


def test_words_of_unseen_tokens_are_named(small_model):
    model = copy.deepcopy(small_model)
    with torch.no_grad():
        for word in ("zebra", "okapi", "taxi"):
            model.clip.token_embedding.weight[tokenize(word)[1:-1]] = 0
    encoder = TextEncoder(model, disk_cache=False)
    with pytest.warns(UserWarning, match="never seen a word of: 'zebra', 'Okapi zebra', 'taxi'; ") as caught:
        encoder.classifier(Vocabulary.parse("road, zebra, Okapi zebra, striped zebra, car|taxi"))
    assert len(caught) == 1


def test_progress_is_reported_to_whoever_asks_and_nothing_is_printed(small_model, capsys):
    encoder = TextEncoder(small_model, disk_cache=False)
    reports: list[tuple[int, int]] = []
    encoder.classifier(Vocabulary.parse(WORDS), progress=lambda *report: reports.append(report))
    assert reports[-1] == (98, 98) and reports == sorted(reports)
    encoder.classifier(Vocabulary.parse(WORDS), progress=lambda *report: pytest.fail("embedded again"))
    assert capsys.readouterr() == ("", "")


def test_thousands_of_words(small_model, tmp_path):
    vocabulary = Vocabulary.parse([f"thing {n}" for n in range(3000)], templates="single")
    first = TextEncoder(small_model, cache_dir=tmp_path).classifier(vocabulary)
    assert first.rows.shape == (3000, 24)
    torch.testing.assert_close(first.rows.norm(dim=1), torch.ones(3000))
    model = Counting(small_model)
    assert torch.equal(TextEncoder(model, cache_dir=tmp_path).classifier(vocabulary).rows, first.rows)
    assert model.prompts == 0
    with torch.no_grad():
        some = Vocabulary.parse(["thing 17", "thing 2999"], templates="single")
        torch.testing.assert_close(first.rows[[17, 2999]], plain_rows(small_model, some), rtol=0, atol=1e-6)
