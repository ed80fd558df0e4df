import json
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from bloomlm.data.stream_decoder import StreamDecoder
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import CheckpointError
from tests.bloom_tokenizer import make_tokenizer, tokenizer_json, write_tokenizer

THE, _THE, AND, ZH = 261, 262, 264, 269

TEXTS = [
    "the cat and the hen",
    "  two  spaces , and a tab\t!\n\n  line",
    "日期：2024年5月17日（星期五）。中世不",
    "मंगलवार, 3 जून 2025।",
    "الجمعة، ١٧ مايو ٢٠٢٤",
    "vendredi 17 mai 2024 … ça déjà vu",
    "こんにちは世界 👩‍👩‍👧 é e\u0301",
    "x = {'a': [1, 2]}  # code\r\n",
    "",
]


def test_encode_gives_the_ids_of_the_merges():
    tokenizer = make_tokenizer()
    assert tokenizer.encode("the the") == [THE, _THE]
    assert tokenizer.encode("and中") == [AND, ZH]
    assert tokenizer.encode("q.") == [4 + ord("q"), 4 + ord(".")]
    # Merges across punctuation exist, but BLOOM cuts words there.
    assert tokenizer.encode("a,中") == [4 + ord("a"), 4 + ord(","), ZH]
    assert tokenizer.encode("a。中") == [4 + ord("a"), *(4 + byte for byte in "。".encode()), ZH]
    assert tokenizer.encode("") == []


def test_encode_adds_nothing_and_reads_special_tokens_in_the_text():
    tokenizer = make_tokenizer()
    assert tokenizer.encode("<s>the</s></s>") == [1, THE, 2, 2]


def test_batches_equal_single_texts():
    tokenizer = make_tokenizer()
    single = [tokenizer._backend.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS] == single


def test_other_threads_run_while_a_long_text_is_encoded():
    tokenizer, text = make_tokenizer(), "the cat and the hen " * 50_000
    encoding = threading.Thread(target=tokenizer.encode, args=[text])
    encoding.start()
    num_turns = 0
    while encoding.is_alive():
        time.sleep(0)
        num_turns += 1
    assert num_turns > 100


@pytest.mark.parametrize("text", TEXTS)
def test_decode_returns_the_text(text):
    tokenizer = make_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_skips_special_and_unknown_ids():
    tokenizer = make_tokenizer()
    ids = np.array([1, THE, 3, _THE, 2, 100_000])
    assert tokenizer.decode(ids) == "the the"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>the<pad> the</s>"


@pytest.mark.parametrize("text", TEXTS)
def test_stream_equals_decode(text):
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(text)
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "�" not in "".join(pieces)
    assert "".join(pieces) + stream.finish() == text


def test_stream_holds_back_half_a_character():
    tokenizer = make_tokenizer()
    stream = StreamDecoder(tokenizer)
    euro = [4 + byte for byte in "€".encode()]
    assert [stream.push(token_id) for token_id in (THE, *euro[:2], 2, euro[2], euro[0])] == ["the", "", "", "", "€", ""]
    assert stream.finish() == "�"
    assert stream.push(THE) == "the"  # ready for the next text
    assert stream.finish() == ""


@pytest.mark.parametrize("skip", [True, False])
def test_stream_of_random_ids_equals_decode(skip):
    # Random bytes are mostly broken UTF-8: the replacement characters must fall where the library puts them.
    tokenizer = make_tokenizer()
    generator = random.Random(0)
    for _ in range(300):
        ids = [generator.randrange(tokenizer.vocab_size + 3) for _ in range(generator.randrange(40))]
        stream = StreamDecoder(tokenizer, skip_special_tokens=skip)
        streamed = "".join(map(stream.push, ids)) + stream.finish()
        assert streamed == tokenizer.decode(ids, skip_special_tokens=skip)


def test_stream_shows_added_tokens_outside_the_byte_alphabet(tmp_path):
    content = tokenizer_json()
    content["added_tokens"].append({**content["added_tokens"][0], "id": 276, "content": "<问 é>", "special": False})
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path, content))
    ids = tokenizer.encode("the<问 é>and")
    assert ids == [THE, 276, AND]
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, ids)) == tokenizer.decode(ids) == "the<问 é>and"


def test_stream_refuses_another_decoder(tmp_path):
    content = tokenizer_json() | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path, content))
    with pytest.raises(CheckpointError, match="does not have BLOOM's decoder, ByteLevel"):
        StreamDecoder(tokenizer)


def test_special_ids_default_to_blooms_names(tmp_path):
    content = tokenizer_json(special=("<pad>", "</s>", "<unk>", "<s>"))
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path, content))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id) == (2, 3)
    assert tokenizer.vocab_size == 276


@pytest.mark.parametrize(
    ("config", "special_map", "eos"),
    [
        ({"eos_token": "<pad>"}, None, 3),
        ({"eos_token": {"content": "<pad>", "lstrip": False}}, None, 3),
        ({"eos_token": None}, None, 2),
        (None, {"eos_token": {"content": "<s>"}}, 1),
        ({"eos_token": "<pad>"}, {"eos_token": "<s>"}, 1),
        ({"eos_token": "<pad>", "added_tokens_decoder": {}}, {"eos_token": "<s>"}, 3),
    ],
)
def test_special_ids_come_from_the_files(tmp_path, config, special_map, eos):
    write_tokenizer(tmp_path)
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special_map)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert Tokenizer.from_directory(tmp_path).eos_token_id == eos


def test_a_token_special_by_config_only_is_special(tmp_path):
    content = tokenizer_json()
    content["added_tokens"] = []
    content["model"]["vocab"] |= {"<end>": 276}
    write_tokenizer(tmp_path, content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("the<end>") == [THE, 276]
    assert tokenizer.decode([THE, 276, 1]) == "the"
    assert tokenizer.is_special(276)
    assert not tokenizer.is_special(THE)


def test_truncation_and_padding_of_the_file_do_not_act(tmp_path):
    content = tokenizer_json() | {
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 8},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 3,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        },
    }
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path, content))
    assert tokenizer.encode("the the the") == [THE, _THE, _THE]
    assert tokenizer.encode_batch(["the"]) == [[THE]]


def test_save_keeps_the_tokenizer_and_what_its_config_said(tmp_path):
    source = write_tokenizer(tmp_path / "a")
    config = {"eos_token": "<pad>", "model_max_length": 99, "padding_side": "right"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    first = Tokenizer.from_directory(source)
    (tmp_path / "b").mkdir()
    first.save(tmp_path / "b")
    second = Tokenizer.from_directory(tmp_path / "b")
    assert (tmp_path / "b/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert second.fingerprint == first.fingerprint
    assert second.eos_token_id == 3
    written = json.loads((tmp_path / "b/tokenizer_config.json").read_text())
    assert written == {
        "tokenizer_class": "BloomTokenizerFast",
        "padding_side": "right",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 99,
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "<pad>",
        "pad_token": "<pad>",
    }
    assert json.loads((tmp_path / "b/special_tokens_map.json").read_text())["eos_token"] == "<pad>"


def test_fingerprint_follows_the_content(tmp_path):
    plain = Tokenizer.from_directory(write_tokenizer(tmp_path / "a")).fingerprint
    assert plain == Tokenizer.from_directory(write_tokenizer(tmp_path / "b")).fingerprint
    assert plain == make_tokenizer().fingerprint
    other = tokenizer_json()
    other["model"]["merges"] = other["model"]["merges"][:-1]
    assert Tokenizer.from_directory(write_tokenizer(tmp_path / "c", other)).fingerprint != plain
    (tmp_path / "b/tokenizer_config.json").write_text('{"eos_token": "<pad>"}')
    assert Tokenizer.from_directory(tmp_path / "b").fingerprint != plain


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: no such directory; expected one that holds tokenizer\.json"):
        Tokenizer.from_directory(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"looked for tokenizer\.json, found config\.json"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("file_name", "text", "message"),
    [
        ("tokenizer.json", "{}", "cannot be read as a tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read: Expecting"),
        ("special_tokens_map.json", "[]", "it holds list; expected a JSON object"),
        ("tokenizer_config.json", '{"pad_token": "[PAD]"}', r"pad_token is '\[PAD\]'.*no id for it \(276 tokens\)"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"276": {"content": "<new>"}}}',
            "gives id 276 to '<new>', but in tokenizer.json that id is None",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path, file_name, text, message):
    write_tokenizer(tmp_path)
    (tmp_path / file_name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_directory(tmp_path)


def test_tokenizer_needs_no_torch():
    code = "import sys, bloomlm.data.tokenizer; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
