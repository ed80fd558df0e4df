import json
import logging
from pathlib import Path

import pytest

from bloomlm.data.chat_template import PLAIN_TEMPLATE, ChatTemplate
from bloomlm.data.conversations import load_conversations
from bloomlm.data.example_set import ExampleSet
from bloomlm.data.files import Row
from bloomlm.data.messages import read_messages
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError, DataError
from tests.bloom_tokenizer import make_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the"},
    {"role": "assistant", "content": "and 中"},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "in the end"},
]
SHAREGPT = [
    {"from": "human", "value": "the"},
    {"from": "gpt", "value": "and 中"},
    {"from": "human", "value": "why?"},
    {"from": "gpt", "value": "in the end"},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOOMLM_CACHE", str(tmp_path / "cache"))


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def plain_tokenizer(template: str = PLAIN_TEMPLATE) -> Tokenizer:
    return make_tokenizer().with_chat_template(template)


def load(path: Path, *, template: str = PLAIN_TEMPLATE, **options: object) -> ExampleSet:
    return load_conversations(path, plain_tokenizer(template), **{"max_length": 1000} | options)


def learned_texts(examples: ExampleSet, index: int = 0) -> list[str]:
    tokenizer, example = plain_tokenizer(), examples[index]
    return [tokenizer.decode(example.tokens[start:stop], skip_special_tokens=False) for start, stop in example.learned]


def test_every_answer_is_learned(tmp_path: Path) -> None:
    examples = load(write_rows(tmp_path / "a.jsonl", [{"messages": TALK}]))
    text = "Be brief.\n\nUser: the\nAssistant: and 中</s>User: why?\nAssistant: in the end</s>"
    assert examples[0].tokens.tolist() == plain_tokenizer().encode(text)
    assert learned_texts(examples) == [" and 中</s>", " in the end</s>"]
    assert examples[0].source_text == text.removesuffix(" in the end</s>")
    assert examples[0].target_text == " in the end"
    assert examples[0].prompt_tokens.tolist() == plain_tokenizer().encode(examples[0].source_text)
    assert examples.num_supervised_tokens == sum(stop - start for start, stop in examples[0].learned)


def test_learn_last_turn(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"messages": TALK}])
    whole, last = load(path), load(path, learn_last_turn=True)
    assert learned_texts(last) == [" in the end</s>"]
    assert last[0].tokens.tolist() == whole[0].tokens.tolist()


@pytest.mark.parametrize("row", [{"conversations": SHAREGPT}, {"conversations": SHAREGPT, "system": "Be brief."}])
def test_sharegpt_rows_are_the_same_conversations(tmp_path: Path, row: dict[str, object]) -> None:
    messages = TALK if "system" in row else TALK[1:]
    ours = load(write_rows(tmp_path / "a.jsonl", [{"messages": messages}]))
    theirs = load(write_rows(tmp_path / "b.jsonl", [row]))
    assert (theirs[0].tokens.tolist(), theirs[0].learned) == (ours[0].tokens.tolist(), ours[0].learned)


def test_a_content_in_parts_is_one_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "t"}, {"type": "text", "text": "he"}]
    messages = [{"role": "user", "content": parts}, TALK[2]]
    joined = load(write_rows(tmp_path / "b.jsonl", [{"messages": messages}]))
    assert (
        joined[0].tokens.tolist()
        == load(write_rows(tmp_path / "a.jsonl", [{"messages": TALK[1:3]}]))[0].tokens.tolist()
    )


def test_tokens_after_the_last_answer_are_left_out(tmp_path: Path) -> None:
    """Nothing that is learned depends on them."""
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [*TALK, {"role": "user", "content": "more"}]}])
    assert (
        load(path)[0].tokens.tolist() == load(write_rows(tmp_path / "b.jsonl", [{"messages": TALK}]))[0].tokens.tolist()
    )


def test_a_token_across_the_border_of_an_answer_is_learned(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}th{% else %}{% generation %}e{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    examples = load(write_rows(tmp_path / "a.jsonl", [{"messages": TALK[1:3]}]), template=template)
    assert learned_texts(examples) == ["theand 中</s>"]


def test_all_tokens_of_the_last_character_are_learned(tmp_path: Path) -> None:
    """transformers marks the first of them alone, where no </s> follows."""
    template = PLAIN_TEMPLATE.replace(" + eos_token", "")
    messages = [TALK[1], {"role": "assistant", "content": "caf\u00e9"}]
    examples = load(write_rows(tmp_path / "a.jsonl", [{"messages": messages}]), template=template)
    assert learned_texts(examples) == [" caf\u00e9"]


def test_a_long_conversation_loses_its_last_turns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"messages": TALK}, {"messages": TALK[1:]}, {"messages": TALK[3:]}]
    path = write_rows(tmp_path / "a.jsonl", rows)
    whole, first = load(path), load(write_rows(tmp_path / "b.jsonl", [{"messages": TALK[:3]}]))
    lengths = whole.lengths.tolist()
    caplog.clear()
    cut = load(path, max_length=lengths[0] - 1)
    assert cut[0].tokens.tolist() == first[0].tokens.tolist()
    assert learned_texts(cut) == [" and 中</s>"]
    assert [cut[number].tokens.tolist() for number in (1, 2)] == [whole[number].tokens.tolist() for number in (1, 2)]
    assert (cut.report.num_shortened, cut.report.num_left_out) == (1, 0)
    message = (
        f"{path}: 3 conversations, 1 lost their last turns and 0 more were left out, because they are longer than "
        f"max_length {lengths[0] - 1} tokens"
    )
    assert [(record.levelno, record.message) for record in caplog.records] == [(logging.WARNING, message)]
    exact = load(path, max_length=lengths[0])
    assert exact.lengths.tolist() == lengths


def test_a_conversation_without_room_for_an_answer_is_left_out(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"messages": TALK}, {"messages": TALK[1:3]}])
    length = load(write_rows(tmp_path / "b.jsonl", [{"messages": TALK[1:3]}])).lengths[0]
    examples = load(path, max_length=length)
    assert len(examples) == 1
    assert (examples.report.num_shortened, examples.report.num_left_out) == (0, 1)
    with pytest.raises(DataError, match=rf"no answer of a conversation ends within max_length {length - 1} tokens"):
        load(path, max_length=length - 1)


@pytest.mark.parametrize("num_answers", range(1, 8))
def test_the_longest_fitting_beginning_is_kept(tmp_path: Path, num_answers: int) -> None:
    messages = [TALK[1 + number % 2] for number in range(16)]
    path = write_rows(tmp_path / "a.jsonl", [{"messages": messages}])
    fitting = load(write_rows(tmp_path / "b.jsonl", [{"messages": messages[: 2 * num_answers]}]))
    for spare in (0, 1):
        cut = load(path, max_length=fitting.lengths[0] + spare)
        assert cut[0].tokens.tolist() == fitting[0].tokens.tolist()


def test_the_cache_knows_the_template(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"messages": TALK}])
    first = load(path)
    again = load(path)
    assert again.report.from_cache
    assert (again[0].tokens.tolist(), again[0].learned) == (first[0].tokens.tolist(), first[0].learned)
    assert not load(path, template=PLAIN_TEMPLATE.replace("User", "Human")).report.from_cache
    assert not load(path, learn_last_turn=True).report.from_cache
    assert not load(path, max_length=999).report.from_cache


def test_a_template_that_does_not_end_answers_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"messages": TALK}])
    load(path)
    assert caplog.records == []
    load(path, template=PLAIN_TEMPLATE.replace(" + eos_token", ""))
    assert "ends an answer without </s>" in caplog.records[0].message


USER, ANSWER = TALK[1], TALK[2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "a"}, "a.jsonl, line 7: found the fields text, expected messages or conversations"),
        ({"messages": [USER], "conversations": []}, "found the fields messages, conversations, expected"),
        ({"messages": "hello"}, "'messages' is 'hello'; expected a list of messages, each an object with 'role'"),
        ({"messages": []}, "'messages' is []; expected a list"),
        ({"messages": ["a"]}, "a.jsonl, line 7, messages[0] is 'a'; expected an object with 'role' and 'content'"),
        ({"messages": [{"role": "user"}]}, "messages[0]: found the fields role, expected 'content'"),
        ({"messages": [{"from": "human", "value": "a"}]}, "messages[0]: found the fields from, value, expected 'role'"),
        (
            {"messages": [USER, {"role": "tool", "content": "a"}]},
            "messages[1]: 'role' is 'tool'; expected one of system",
        ),
        ({"messages": [{"role": 3, "content": "a"}]}, "messages[0]: 'role' is 3; expected one of"),
        (
            {"messages": [USER, {"role": "assistant", "content": " \n"}]},
            "messages[1]: 'content' is empty; expected what",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]: 'content' is null, expected text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0]: 'content' has half of a surrogate pair"),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, "messages[1]: found 'weight'"),
        ({"messages": [USER, ANSWER | {"tool_calls": [{}]}]}, "messages[1]: found 'tool_calls'"),
        ({"messages": [USER], "tools": [{}]}, "line 7: found 'tools', and conversations with tools"),
        (
            {"conversations": [{"from": "bing", "value": "a"}]},
            "conversations[0]: 'from' is 'bing'; expected one of system, human",
        ),
        ({"conversations": [{"from": "gpt", "value": "a"}], "system": 3}, "line 7: 'system' is int 3, expected text"),
    ],
)
def test_bad_rows(fields: dict[str, object], message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_messages(Row(fields=fields, where="a.jsonl, line 7"))
    assert message in str(caught.value)


def test_fields_of_other_names_are_left_to_the_template() -> None:
    messages = read_messages(Row(fields={"messages": [USER | {"name": "Ann", "tool_calls": []}], "id": 3}, where="a"))
    template = ChatTemplate("{{ messages[0].name }}: {{ messages[0].content }}", {})
    assert template.render(messages, add_generation_prompt=True) == "Ann: the"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "it has no rows"),
        ([{"messages": TALK}, {"messages": TALK[:2]}], "line 2: no message is the assistant's"),
        ([{"messages": TALK}, {"messages": [USER, TALK[0], ANSWER]}], "line 2: the chat template does not take these"),
        ([{"messages": TALK}, {"src": "a", "tgt": "b"}], "line 2: found the fields src, tgt, expected messages"),
    ],
)
def test_bad_files(tmp_path: Path, rows: list[dict[str, object]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(write_rows(tmp_path / "a.jsonl", rows))


def test_a_template_without_answers_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"messages": TALK[1:3]}])
    with pytest.raises(DataError, match="leaves out what the assistant wrote"):
        load(
            path,
            template="{% for m in messages if m.role == 'user' %}{% generation %}{% endgeneration %}{{ m.content }}{% endfor %}",
        )


def test_a_model_without_a_template_says_how_to_give_one(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"messages": TALK}])
    with pytest.raises(ConfigError, match=r"test tokenizer has no chat template; give --chat_template plain"):
        load_conversations(path, make_tokenizer(), max_length=100)
