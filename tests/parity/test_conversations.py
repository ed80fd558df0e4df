"""What is learned of conversations equals what TRL learns (as record_trl_labels.py recorded) and what transformers marks."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bloomlm.data.chat_template import ChatTemplate
from bloomlm.data.conversations import load_conversations
from bloomlm.data.loader import collate
from bloomlm.parallel.vocabulary_scores import IGNORE_INDEX
from tests.bloom_tokenizer import make_tokenizer
from tests.parity.record_trl_labels import FIXTURE, TEMPLATES, rows


def our_examples(template: str, directory: Path) -> list[Any]:
    path = directory / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    tokenizer = make_tokenizer().with_chat_template(template)
    return list(load_conversations(path, tokenizer, max_length=1000, cache_dir=directory))


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_equal_those_of_trl(name: str, tmp_path: Path) -> None:
    recorded = json.loads(FIXTURE.read_text(encoding="utf-8"))["labels"][name]
    examples = our_examples(TEMPLATES[name], tmp_path)
    assert len(examples) == len(recorded) == 4
    for example, theirs in zip(examples, recorded, strict=True):
        length = len(example.tokens)
        assert example.tokens.tolist() == theirs["input_ids"][:length]
        # TRL's model shifts the labels by one position, which collate has done; nothing is learned after ours end
        assert collate([example]).labels.tolist() == theirs["labels"][1:length]
        assert set(theirs["labels"][length:]) <= {IGNORE_INDEX}


@pytest.mark.parametrize("name", TEMPLATES)
def test_transformers_reads_the_saved_template_and_marks_the_same_tokens(name: str, tmp_path: Path) -> None:
    make_tokenizer().with_chat_template(TEMPLATES[name]).save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for example, row in zip(our_examples(TEMPLATES[name], tmp_path), rows(), strict=True):
        encoded = theirs.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        learned = [0] * len(encoded["input_ids"])
        for start, stop in example.learned:
            learned[start:stop] = [1] * (stop - start)
        assert encoded["assistant_masks"] == learned
        assert encoded["input_ids"][: len(example.tokens)] == example.tokens.tolist()


@pytest.mark.parametrize("name", ["plain", "chatml"])
def test_prompts_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    ours = make_tokenizer().with_chat_template(TEMPLATES[name])
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for row in rows():
        prompt = theirs.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        template = ChatTemplate(TEMPLATES[name], ours.special_tokens)
        assert template.render(row["messages"], add_generation_prompt=True) == prompt
