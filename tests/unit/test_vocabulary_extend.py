"""Extended vocabularies: what new merges change and what they leave, rows by value, files, and training on."""

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bloomlm.checkpoint.convert import open_model_conversion
from bloomlm.checkpoint.formats import FileForm
from bloomlm.checkpoint.reader import load_model, read_config
from bloomlm.cli.convert import command as convert_command
from bloomlm.cli.extend import ExtendConfig, extend
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import CheckpointError, ConfigError, DataError
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.generate import generate
from bloomlm.vocabulary.extend import plan_extension
from bloomlm.vocabulary.merges import NewToken, WordEncoder, extended_json, learn_merges
from bloomlm.vocabulary.new_tokens import NEW_TOKENS_FILE, read_new_tokens
from bloomlm.vocabulary.selection import Vocabulary, read_vocabulary
from tests.bloom_tokenizer import make_tokenizer
from tests.tiny_bloom import write_bloom

WORDS = ("linguistic", "the", "and", "thing", "language", "世界", "中国", "がんばる", "dates", "überaus", "वाक्य")
NUM_NEW = 40


def texts(seed: int = 0, count: int = 300) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(1, 12))) + chosen.choice("\n.,") for _ in range(count)]


@pytest.fixture(scope="module")
def old() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def vocabulary(old: Tokenizer) -> Vocabulary:
    return read_vocabulary(old)


@pytest.fixture(scope="module")
def new(old: Tokenizer, vocabulary: Vocabulary) -> tuple[NewToken, ...]:
    return learn_merges(texts(), old, vocabulary, NUM_NEW)


@pytest.fixture(scope="module")
def extended(old: Tokenizer, vocabulary: Vocabulary, new: tuple[NewToken, ...]) -> Tokenizer:
    return old.with_json(extended_json(vocabulary.content, vocabulary.num_ids, new))


def merged_by_hand(
    word: Sequence[int], new: Sequence[NewToken], ids: dict[str, int], names: dict[int, str]
) -> list[int]:
    """The slow oracle: new merges in their order over the old tokens of a word, leftmost first."""
    tokens = [names[token] for token in word]
    for merge in new:
        place = 0
        while place < len(tokens) - 1:
            if (tokens[place], tokens[place + 1]) == (merge.left, merge.right):
                tokens[place : place + 2] = [merge.left + merge.right]
            place += 1
    return [ids[token] for token in tokens]


def test_new_tokens_are_new_and_built_of_what_they_replace(
    old: Tokenizer, vocabulary: Vocabulary, new: tuple[NewToken, ...], extended: Tokenizer
) -> None:
    assert len(new) == NUM_NEW and extended.vocab_size == old.vocab_size + NUM_NEW
    names = [token.left + token.right for token in new]
    assert len({*names} | vocabulary.ids.keys()) == NUM_NEW + len(vocabulary.ids)
    for number, token in enumerate(new):
        pieces = b"".join(old.token_bytes(piece) for piece in token.pieces)
        assert extended.token_bytes(vocabulary.num_ids + number) == pieces
        parts = {token.left, token.right}
        assert parts <= vocabulary.ids.keys() | set(names[:number])


def test_equals_new_merges_over_old_tokens(
    old: Tokenizer, vocabulary: Vocabulary, new: tuple[NewToken, ...], extended: Tokenizer
) -> None:
    names = {token: name for name, token in vocabulary.ids.items()}
    ids = {**vocabulary.ids, **{t.left + t.right: vocabulary.num_ids + n for n, t in enumerate(new)}}
    examined = [*texts(1), "the linguisticthing and.,\n\nverylinguage   世界世", "</s>the</s>", ""]
    for text, words in zip(examined, WordEncoder(old)(examined), strict=True):
        expected = [token for word in words for token in merged_by_hand(word, new, ids, names)]
        assert extended.encode(text) == expected
        assert [token for word in words for token in word] == old.encode(text)
    assert sum(map(len, extended.encode_batch(examined))) < 0.7 * sum(map(len, old.encode_batch(examined)))


def random_text(seed: int) -> str:
    """Characters of any kind, and letters and words that new tokens are made of."""
    chosen = random.Random(seed)
    parts = []
    for _ in range(chosen.randint(0, 40)):
        code = chosen.randrange(1, 0x110000)
        other = "?" if 0xD800 <= code < 0xE000 else chr(code)
        letters = chosen.choices("thean linguisc.,\n 世", k=8)
        parts.append(chosen.choice([other, chosen.choice(WORDS), *letters]))
    return "".join(parts)


def test_any_text_round_trips_and_keeps_its_ids_without_new_tokens(
    old: Tokenizer, vocabulary: Vocabulary, extended: Tokenizer
) -> None:
    num_same = 0
    for seed in range(2000):
        text = random_text(seed)
        ids = extended.encode(text)
        assert extended.decode(ids, skip_special_tokens=False) == text
        if all(token < vocabulary.num_ids for token in ids):
            assert ids == old.encode(text)
            num_same += 1
    assert 200 < num_same < 1800


def test_a_merge_into_a_token_that_exists_is_left_out(old: Tokenizer, vocabulary: Vocabulary) -> None:
    # "th" is a token and "e" too, but after " t" the old merges never meet: only " " + "the" would give " the"
    learned = learn_merges(["and anding anding"] * 9, old, vocabulary, 1)
    assert [token.left + token.right for token in learned] != []
    assert not {token.left + token.right for token in learned} & vocabulary.ids.keys()


def test_a_corpus_that_is_too_small_is_refused(old: Tokenizer, vocabulary: Vocabulary) -> None:
    with pytest.raises(DataError, match="gives only 0 new tokens"):
        learn_merges(["the"], old, vocabulary, 5)
    with pytest.raises(DataError, match=r"gives only \d+ new tokens .* and 5000 are to be added"):
        learn_merges(texts(), old, vocabulary, 5000)


def test_merges_as_texts_and_as_pairs(old: Tokenizer, vocabulary: Vocabulary, new: tuple[NewToken, ...]) -> None:
    model = dict(vocabulary.content["model"])
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    found = []
    for merges in ([" ".join(pair) for pair in pairs], pairs):
        content = {**vocabulary.content, "model": {**model, "merges": merges}}
        found.append(old.with_json(extended_json(content, vocabulary.num_ids, new)).encode_batch(texts(2)))
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 6 rows beyond its tokens."""
    return write_bloom(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    (directory / "new.txt").write_text("\n".join(texts(3, 4000)), encoding="utf-8")
    kept = directory / "kept"
    kept.mkdir()
    (kept / "en.txt").write_text("fox kof zoo. " * 50, encoding="utf-8")
    (kept / "xx.txt").write_text("the linguistic thing. " * 50, encoding="utf-8")
    return directory


def flags(base: Path, corpus: Path, output: Path, **changes: object) -> ExtendConfig:
    values: dict[str, object] = {
        "model_name_or_path": str(base),
        "corpus": (str(corpus / "new.txt"),),
        "kept_languages_from": str(corpus / "kept"),
        "held_out_bytes": 4096,
        "add_tokens": NUM_NEW,
        "output_path": str(output),
        "device": "cpu",
        **changes,
    }
    return ExtendConfig(**values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def output(base: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("output") / "extended"
    extend(flags(base, corpus, directory, pad_to_multiple_of=64, max_shard_size="20KB"))
    return directory


def test_rows_by_value(base: Path, output: Path) -> None:
    before, after = load_model(base), load_model(output)
    first = Tokenizer.from_directory(base).vocab_size
    old_rows, rows = (m.transformer.word_embeddings.weight.detach() for m in (before, after))
    assert len(old_rows) == first + 6 and len(rows) == read_config(output).vocab_size == 320
    assert torch.equal(rows[:first], old_rows[:first])
    report = json.loads((output / "report.json").read_text())
    tokenizer = Tokenizer.from_directory(base)
    for token in report["new_tokens"]:
        # what a text of one new token is in the old vocabulary, where it is a whole text
        if "\ufffd" not in token["text"]:
            pieces = tokenizer.encode(token["text"])
            torch.testing.assert_close(rows[token["id"]], old_rows[pieces].mean(0), rtol=1e-5, atol=1e-6)
    padding = rows[first + NUM_NEW :]
    torch.testing.assert_close(padding, old_rows[:first].mean(0).expand_as(padding), rtol=1e-5, atol=1e-6)
    for name, parameter in before.named_parameters():
        if "word_embeddings.weight" not in name:
            assert torch.equal(after.get_parameter(name), parameter), name
    assert read_new_tokens(output) == range(first, first + NUM_NEW)


def test_spare_rows_are_used_first_and_stay_where_they_are_not_needed(
    base: Path, old: Tokenizer, vocabulary: Vocabulary, new: tuple[NewToken, ...]
) -> None:
    embedding = load_model(base).transformer.word_embeddings.weight.detach()
    config, first = read_config(base), vocabulary.num_ids
    few = plan_extension(vocabulary, new[:4], config, old)
    assert few.config.vocab_size == config.vocab_size == first + 6
    rows = few.rows(embedding)
    whole = rows.read_rows(0, config.vocab_size)
    assert torch.equal(whole[:first], embedding[:first]) and torch.equal(whole[first + 4 :], embedding[first + 4 :])
    assert torch.equal(whole[first], embedding[list(new[0].pieces)].mean(0))
    in_pieces = [rows.read_rows(n, min(n + 7, len(whole))) for n in range(0, len(whole), 7)]
    assert torch.equal(torch.cat(in_pieces), whole)
    with pytest.raises(ConfigError, match="they belong to different models"):
        plan_extension(vocabulary, new, dataclasses.replace(config, vocab_size=first - 1), old)


def test_greedy_text_of_the_same_ids_does_not_change_before_training(base: Path, output: Path) -> None:
    prompts = [[5, 9, 100, 33], [70, 71], [260, 261, 12]]
    config = GenerationConfig(max_new_tokens=12)
    found, expected = (generate(load_model(path), prompts, config) for path in (output, base))
    assert [each.tokens for each in found] == [each.tokens for each in expected]


def test_the_report_says_what_changed(output: Path) -> None:
    values = json.loads((output / "report.json").read_text())
    new, kept = values["new"], values["kept"]
    assert new["fits"]["all"]["after"]["tokens_per_word"] < 0.7 * new["fits"]["all"]["before"]["tokens_per_word"]
    assert new["fits"]["all"]["before"]["bytes"] > 3000
    assert kept["changed_words_by_language"]["en"] == 0 < kept["changed_words_by_language"]["xx"]
    assert kept["changed_words"] == kept["changed_words_by_language"]["xx"] <= kept["words"]
    changed = {row["word"]: row for row in kept["most_frequent_changed"]}
    for word, row in changed.items():
        assert word == "".join(row["before"]) == "".join(row["after"]) and len(row["after"]) < len(row["before"])
    assert sum(row["occurrences"] for row in changed.values()) == kept["changed_words"]
    english = kept["fits"]["en"]
    assert english["before"]["tokens"] == english["after"]["tokens"]
    # new tokens take a little probability
    assert 0 < english["after"]["bits_per_byte"] - english["before"]["bits_per_byte"] < 0.5
    markdown = (output / "report.md").read_text()
    assert "| en |" in markdown and "have other tokens than before" in markdown


def test_paddlenlps_files_take_it(output: Path, tmp_path: Path) -> None:
    convert_command.main(
        ["--input", str(output), "--to", "paddle", "--output", str(tmp_path / "paddle")],
        standalone_mode=False,
    )
    ids = torch.tensor([[1, 280, 290, 300, 7]])
    assert torch.equal(load_model(tmp_path / "paddle")(ids), load_model(output)(ids))
    text = texts(5, 1)[0]
    found, expected = (Tokenizer.from_directory(path).encode(text) for path in (tmp_path / "paddle", output))
    assert found == expected


def test_without_measuring_no_model_is_loaded(
    base: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bloomlm.cli.extend.load", None)
    extend(flags(base, corpus, tmp_path / "out", held_out_bytes=0))
    assert json.loads((tmp_path / "out" / "report.json").read_text())["kept"] is None
    source = open_model_conversion(tmp_path / "out", FileForm.HUGGING_FACE)
    assert source.config.vocab_size == Tokenizer.from_directory(base).vocab_size + NUM_NEW


def test_refusals_leave_nothing(base: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is the model itself"):
        extend(flags(base, corpus, base))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter").touch()
    with pytest.raises(CheckpointError, match="no model or adapter to replace"):
        extend(flags(base, corpus, tmp_path / "other"))
    with pytest.raises(DataError, match="100000 are to be added"):
        extend(flags(base, corpus, tmp_path / "out", add_tokens=100_000))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[]", "{", '{"first_token": -1, "num_tokens": 2}', '{"first_token": 1}'])
def test_a_damaged_record_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / NEW_TOKENS_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=NEW_TOKENS_FILE):
        read_new_tokens(tmp_path)
