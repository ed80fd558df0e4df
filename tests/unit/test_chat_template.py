import json
from pathlib import Path

import pytest
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bloomlm.data import template_sandbox
from bloomlm.data.chat_template import PLAIN_TEMPLATE, ChatTemplate, read_chat_template
from bloomlm.errors import ConfigError, DataError
from tests.bloom_tokenizer import make_tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
CONVERSATION = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "\n中é "},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "(no)"},
]
# Without blocks that mark the answers.
UNMARKED = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</{{ message.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def answers_of(template: str, messages: list[dict[str, str]] = CONVERSATION) -> tuple[str, list[str]]:
    text, answers = ChatTemplate(template, SPECIAL).render_with_answers(messages)
    return text, [text[start:stop] for start, stop in answers]


def test_plain_template() -> None:
    text, answers = answers_of(PLAIN_TEMPLATE)
    assert text == "Be brief.\n\nUser: Who?\nAssistant: 中é</s>User: Why?\nAssistant: (no)</s>"
    assert answers == [" 中é</s>", " (no)</s>"]
    template = ChatTemplate(PLAIN_TEMPLATE, SPECIAL)
    assert template.render(CONVERSATION[1:2], add_generation_prompt=True) == "User: Who?\nAssistant:"
    assert template.render(CONVERSATION, add_generation_prompt=False) == text


@pytest.mark.parametrize("answer", ["hello", "(a)", ".", "  the", "\nthe", "中", "-", "</s>"])
def test_a_plain_prompt_has_the_same_tokens_before_an_answer(answer: str) -> None:
    """Otherwise a model would be asked with other tokens than it learned from."""
    template, tokenizer = ChatTemplate(PLAIN_TEMPLATE, SPECIAL), make_tokenizer()
    messages = [{"role": "user", "content": "the end"}]
    prompt = tokenizer.encode(template.render(messages, add_generation_prompt=True))
    whole = tokenizer.encode(
        template.render([*messages, {"role": "assistant", "content": answer}], add_generation_prompt=False)
    )
    assert whole[: len(prompt)] == prompt


@pytest.mark.parametrize("roles", [("user", "system"), ("user", "tool"), ("system", "system")])
def test_plain_template_refuses_other_orders(roles: tuple[str, ...]) -> None:
    messages = [{"role": role, "content": "a"} for role in roles]
    with pytest.raises(DataError, match="expected user and assistant messages"):
        ChatTemplate(PLAIN_TEMPLATE, SPECIAL).render(messages, add_generation_prompt=False)


def test_marked_answers() -> None:
    text, answers = answers_of(MARKED)
    assert text == "<system>Be brief. <user>Who?<assistant>\n中é </s><user>Why?<assistant>(no)</s>"
    assert answers == ["\n中é </s>", "(no)</s>"]


def test_nested_blocks_are_one_answer() -> None:
    text, answers = answers_of("a{% generation %}b{% generation %}c{% endgeneration %}d{% endgeneration %}e")
    assert (text, answers) == ("abcde", ["bcd"])


def test_a_block_inside_a_macro_and_a_captured_text_is_found() -> None:
    template = (
        "{% macro say(m) %}[{% generation %}{{ m.content }}{% endgeneration %}]{% endmacro %}"
        "{% set all %}{% for m in messages %}{% if m.role == 'assistant' %}{{ say(m) }}{% else %}{{ m.role }}{% endif %}"
        "{% endfor %}{% endset %}{{ all }}"
    )
    text, answers = answers_of(template)
    assert (text, answers) == ("systemuser[\n中é ]user[(no)]", ["\n中é ", "(no)"])


def test_answers_of_a_template_without_blocks_are_found_by_prefixes() -> None:
    text, answers = answers_of(UNMARKED)
    assert text.startswith("<system>Be brief. </system><user>Who?</user><assistant>\n中é </assistant>")
    assert answers == ["\n中é </assistant>", "(no)</assistant>"]


@pytest.mark.parametrize(
    "forgets",
    [
        "{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% if loop.last and m.role == 'assistant' %}!{% endif %}{% endfor %}",
    ],
)
def test_a_template_that_changes_earlier_turns_needs_blocks(forgets: str) -> None:
    with pytest.raises(DataError, match=r"first 3 messages. Put \{% generation %\}"):
        answers_of(forgets)


def test_templates_that_are_none() -> None:
    with pytest.raises(ConfigError, match="no Jinja template"):
        ChatTemplate("{% for %}", SPECIAL)
    with pytest.raises(ConfigError, match="no Jinja template"):
        ChatTemplate("{% generation %}", SPECIAL)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].nothing.more }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for i in range(10 ** 9) %}a{% endfor %}",
        "{{ messages.clear() }}",
    ],
)
def test_a_template_that_fails_does_not_take_the_messages(template: str) -> None:
    with pytest.raises(DataError, match="does not take these messages"):
        ChatTemplate(template, SPECIAL).render(CONVERSATION, add_generation_prompt=True)


def test_read_chat_template(tmp_path: Path) -> None:
    assert read_chat_template("plain") == PLAIN_TEMPLATE
    (tmp_path / "chat.jinja").write_text("{{ messages }}中", encoding="utf-8")
    assert read_chat_template(str(tmp_path / "chat.jinja")) == "{{ messages }}中"
    with pytest.raises(ConfigError, match=r"--chat_template .*missing cannot be read: .*or plain"):
        read_chat_template(str(tmp_path / "missing"))


DOUBLE = "{% set ns = namespace(x='xy') %}{% for _ in range(60) %}{% set ns.x = BODY %}{% endfor %}"
LONG = "{% set x = 'ab' * 10000000 %}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10 ** 10 }}",
        "{{ 3 * [0] * 10 ** 9 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{% set ns = namespace(x=7) %}{% for _ in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ 'x'.zfill(1000000000) }}",
        "{{ '\\n' | indent(width=1000000000, first=true) }}",
        "{{ [1] | tojson(indent=1000000000) }}",
        DOUBLE.replace("BODY", "ns.x + ns.x"),
        DOUBLE.replace("BODY", "ns.x ~ ns.x"),
        DOUBLE.replace("BODY", "ns.x | replace('x', 'xx') | replace('y', 'yy')"),
        DOUBLE.replace("BODY", "[ns.x, ns.x] | join"),
        DOUBLE.replace("BODY", "ns.x.join(['', '', ''])"),
        LONG + "{{ x.replace('a', x) }}",
        LONG + "{{ x | replace('a', x) }}",
        LONG + "{% for i in range(100000) %}{{ x }}{% endfor %}",
        LONG + "{% macro m() %}{% for i in range(100000) %}{{ x }}{% endfor %}{% endmacro %}{{ m() }}",
        LONG + "{% set y %}{% for i in range(100000) %}{{ x }}{% endfor %}{% endset %}",
        LONG + "{% for i in range(100000) %}{% set y = x.upper() %}{% endfor %}",
    ],
)
def test_a_template_cannot_take_all_memory(template: str) -> None:
    assert refusal(template) == "it makes texts of more than 100,000,000 characters"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% for i in range(100000) %}{% set y = range(100000) | sum %}{% endfor %}",
        "{% for i in [1] recursive %}{% if loop.depth < 60 %}{{ loop([1]) }}{{ loop([1]) }}{% endif %}{% endfor %}",
    ],
)
def test_a_template_cannot_take_all_time(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MOST_SECONDS", 0.2)
    assert refusal(template) == "it takes longer than 0 s"


def refusal(template: str) -> str:
    """Why a template is refused when it is read or rendered."""
    with pytest.raises((ConfigError, DataError)) as refused:
        ChatTemplate(template, SPECIAL).render(CONVERSATION, add_generation_prompt=True)
    return str(refused.value.__cause__)


def test_what_templates_do_is_as_in_jinja() -> None:
    template = (
        "{% for m in messages if m.role != 'system' %}{{ loop.index0 }}/{{ loop.length }}{{ ',' if loop.last }}"
        "{{ loop.previtem.role if loop.previtem }} {{ m.content | trim | tojson }}"
        "{% if loop.first %}{% continue %}{% endif %}{{ '-' * 3 ~ (1 + 2) }}{{ 'a%s' % 1 }}{{ '{:>3}'.format(2) }}"
        "{{ [1, 2] | map('string') | join('+') }}{{ m.items() | list | length }}{% else %}none{% endfor %}"
        "{% for x in [[1, [2]]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}{{ 2 ** 10 }}"
    )
    own = ChatTemplate(template, SPECIAL).render(CONVERSATION, add_generation_prompt=False)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    assert own == environment.from_string(template).render(messages=CONVERSATION, **SPECIAL)
