"""Our tokenizer against transformers' AutoTokenizer on the same directory."""

import json
import random

import pytest

from bloomlm.data.stream_decoder import StreamDecoder
from bloomlm.data.tokenizer import Tokenizer
from tests.bloom_tokenizer import tokenizer_json, write_tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = [
    "The cat and the hen .  It 's 5 % , isn 't it ?",
    "日期：2024年5月17日（星期五）。中世不",
    "मंगलवार, 3 जून 2025।",
    "الجمعة، ١٧ مايو ٢٠٢٤",
    "vendredi 17 mai 2024 … ça déjà vu !",
    "こんにちは世界 👩‍👩‍👧 e\u0301\u200b\u00a0x",
    "def f(x):\r\n\treturn x  # [1, 2]\n\n\n",
    "<s>the prompt</s>and<pad> more <unk></s>",
    "a。中,a,b 、中",
    "   leading and trailing   ",
    "\x00\x07\ufeff\u2028",
    "",
]

# What bigscience's repositories hold, what transformers 5 writes, and no file at all.
CONFIGS = {
    "bigscience": {
        "unk_token": "<unk>",
        "eos_token": "</s>",
        "bos_token": "<s>",
        "pad_token": "<pad>",
        "name_or_path": "bigscience/tokenizer",
        "special_tokens_map_file": None,
        "tokenizer_class": "BloomTokenizerFast",
        "padding_side": "left",
    },
    "clean_up": {
        "eos_token": {"content": "</s>", "__type": "AddedToken", "lstrip": False, "rstrip": False},
        "tokenizer_class": "BloomTokenizerFast",
        "clean_up_tokenization_spaces": True,
    },
    "none": {"tokenizer_class": "BloomTokenizerFast"},
}


@pytest.fixture(params=sorted(CONFIGS))
def pair(request, tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIGS[request.param]))
    return Tokenizer.from_directory(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)


def test_encode_equals_transformers(pair):
    ours, theirs = pair
    expected = [theirs(text)["input_ids"] for text in TEXTS]
    assert [ours.encode(text) for text in TEXTS] == expected
    assert ours.encode_batch(TEXTS) == expected


def test_decode_equals_transformers(pair):
    ours, theirs = pair
    for text in TEXTS:
        ids = ours.encode(text)
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip)
            stream = StreamDecoder(ours, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == expected
            assert "".join(map(stream.push, ids)) + stream.finish() == expected


def test_decode_of_random_ids_equals_transformers(pair):
    ours, theirs = pair
    generator = random.Random(1)
    for _ in range(200):
        ids = [generator.randrange(ours.vocab_size) for _ in range(generator.randrange(1, 30))]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_what_we_save_opens_in_transformers(pair, tmp_path):
    ours, _ = pair
    saved = tmp_path / "saved"
    saved.mkdir()
    ours.save(saved)
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    assert [theirs(text)["input_ids"] for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert (theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2, 3)
    assert (ours.unk_token_id, ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (0, 1, 2, 3)
    batch = theirs(["the", "the cat and"], padding=True)
    shorter, longer = ours.encode("the"), ours.encode("the cat and")
    pads = len(longer) - len(shorter)
    assert pads > 0
    assert batch["input_ids"] == [[3] * pads + shorter, longer]
    assert batch["attention_mask"] == [[0] * pads + [1] * len(shorter), [1] * len(longer)]


def test_we_open_what_transformers_saves(pair, tmp_path):
    ours, theirs = pair
    theirs.save_pretrained(tmp_path / "theirs")
    again = Tokenizer.from_directory(tmp_path / "theirs")
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert (again.unk_token_id, again.bos_token_id, again.eos_token_id, again.pad_token_id) == (0, 1, 2, 3)


def test_a_token_special_by_config_only_equals_transformers(tmp_path):
    content = tokenizer_json()
    content["model"]["vocab"] |= {"<end>": 276}
    write_tokenizer(tmp_path, content)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<end>", "tokenizer_class": "BloomTokenizerFast"})
    )
    ours, theirs = Tokenizer.from_directory(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = theirs("the <end>and</s>")["input_ids"]
    assert ours.encode("the <end>and</s>") == ids
    assert ours.eos_token_id == theirs.eos_token_id == 276
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
