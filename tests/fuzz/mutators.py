"""Damage to files: by accident (bits, lengths, missing pieces) and on purpose (paths, code, huge sizes).

A mutation is a function of a file and a random generator, so that a seed repeats it. Which mutations fit a file follows
from the file's content and ending (`mutators_of`).
"""

import io
import json
import os
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Random = random.Random
Bytes = Callable[[bytes, Random], bytes]
"""Damages the content of a file."""

MARKER = "fuzz-marker"
"""Name of the file that hostile content tries to create outside of the directory that is read."""
HUGE = (1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 64, 10**30, -1, 0, 1)
PATHS = (
    "../secret",
    f"../{MARKER}",
    f"/tmp/{MARKER}",
    "..",
    ".",
    "",
    "/",
    "/etc/passwd",
    "a/b",
    "a\0b",
    "~",
    "x" * 300,
    "/dev/zero",
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 255, 65_537, 0.5, -0.0, 1e308, 1e-320, *HUGE),
    *(
        r"([a-z_.]+)+!",
        ".*.*.*.*.*.*.*.*!",
        "(",
        float("nan"),
        float("inf"),
        "",
        "x",
        "0",
        "1e9",
        "NaN",
        "\ud800",
        "\0",
        "é中😀",
        "y" * 5000,
        *PATHS,
    ),
    *([], {}, [[]], [None], {"": {}}, [1, 2, 3], {"a": [1, {"b": None}]}, ["a", "a"], [0.5] * 3),
)


class Evil:
    """An object whose unpickling runs a command."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (f"touch ../{MARKER}",)


# --- bytes of any kind


def flip_bits(data: bytes, rng: Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if damaged:
            damaged[place(damaged, rng)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def truncate(data: bytes, rng: Random) -> bytes:
    return data[: place(data, rng)]


def empty(data: bytes, rng: Random) -> bytes:
    return b""


def append(data: bytes, rng: Random) -> bytes:
    return data + rng.choice((rng.randbytes(rng.randrange(1, 200)), b"\0" * 4096, data, b"\n", b"}"))


def duplicate_chunk(data: bytes, rng: Random) -> bytes:
    start, stop = chunk(data, rng)
    return data[:stop] + data[start:stop] * rng.choice((1, 1, 3)) + data[stop:]


def remove_chunk(data: bytes, rng: Random) -> bytes:
    start, stop = chunk(data, rng)
    return data[:start] + data[stop:]


def swap_chunks(data: bytes, rng: Random) -> bytes:
    a, b, c, d = sorted(place(data, rng) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def zero_chunk(data: bytes, rng: Random) -> bytes:
    start, stop = chunk(data, rng)
    return data[:start] + rng.choice((b"\0", b"\xff")) * (stop - start) + data[stop:]


def set_number(data: bytes, rng: Random) -> bytes:
    """A length, an offset or a count becomes another one."""
    form = rng.choice(("<B", "<H", "<I", "<Q", ">I", ">Q"))
    size = struct.calcsize(form)
    if len(data) < size:
        return data
    start = place(data[: len(data) - size + 1], rng)
    old = struct.unpack_from(form, data, start)[0]
    new = rng.choice((*HUGE, len(data), len(data) + 1, old + 1, old - 1, old * 2, old << 8)) % (1 << 8 * size)
    return data[:start] + struct.pack(form, new) + data[start + size :]


def insert_bytes(data: bytes, rng: Random) -> bytes:
    start = place(data, rng)
    return (
        data[:start]
        + rng.choice((b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", rng.randbytes(7)))
        + data[start:]
    )


BYTES: tuple[Bytes, ...] = (
    *(flip_bits, truncate, empty, append, duplicate_chunk, remove_chunk, swap_chunks, zero_chunk, set_number),
    *(insert_bytes, flip_bits, set_number),
)

# --- text


def change_digits(data: bytes, rng: Random) -> bytes:
    """A number in a text becomes another one."""
    starts = [i for i in range(len(data)) if data[i : i + 1].isdigit() and not data[i - 1 : i].isdigit()]
    if not starts:
        return append(data, rng)
    start = stop = rng.choice(starts)
    while data[stop : stop + 1].isdigit():
        stop += 1
    number = rng.choice((*map(str, HUGE), "9" * 5000, "1e999", "0x10", "00", "1_000", "NaN"))
    return data[:start] + number.encode() + data[stop:]


def nest(data: bytes, rng: Random) -> bytes:
    """Brackets inside brackets, far deeper than a program's stack."""
    depth = rng.choice((100, 3000, 100_000))
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}"), (b"- ", b""), (b"(", b")")))
    nested = opening * depth + b"1" + closing * depth
    start = place(data, rng)
    return rng.choice((nested, data[:start] + nested + data[start:]))


def move_lines(data: bytes, rng: Random) -> bytes:
    lines = data.split(b"\n")
    action = rng.randrange(4)
    if action == 0:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
    elif action == 1:
        lines.pop(rng.randrange(len(lines)))
    elif action == 2:
        rng.shuffle(lines)
    else:
        lines[rng.randrange(len(lines))] = rng.choice(
            (b"", b"x" * 200_000, b",,,,", b'"', b"\r", b"null", b"[]", b"1 2 3")
        )
    return b"\n".join(lines)


def change_words(data: bytes, rng: Random) -> bytes:
    words = data.split(b" ")
    words[rng.randrange(len(words))] = text_of(rng.choice(VALUES))
    return b" ".join(words)


TEXT: tuple[Bytes, ...] = (change_digits, nest, move_lines, change_words, *BYTES)

# --- JSON


def change_json(data: bytes, rng: Random) -> bytes:
    """Values of other types, missing, renamed and repeated keys in a JSON text."""
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        value = change_value(value, rng)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def repeat_key(data: bytes, rng: Random) -> bytes:
    """An object that has a key twice."""
    value = json.loads(data)
    if not isinstance(value, dict) or not value:
        return change_json(data, rng)
    key = rng.choice(list(value))
    return data.rstrip().removesuffix(b"}") + b", " + json.dumps({key: rng.choice(VALUES)}).encode()[1:]


def change_value(value: Any, rng: Random) -> Any:
    """A copy of a value in which one node, chosen at random, has changed."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return rng.choice(VALUES)
    items = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    key = rng.choice(list(items))
    action = rng.random()
    if action < 0.6:
        items[key] = change_value(items[key], rng)
    elif action < 0.7:
        del items[key]
    elif action < 0.85:
        other = rng.choice(list(items))
        items[key], items[other] = items[other], items[key]
    elif isinstance(value, dict):
        items[rng.choice((str(key) + "x", *PATHS, "0"))] = items.pop(key)
    else:
        items[len(items)] = items[key]
    return items if isinstance(value, dict) else list(items.values())


JSON: tuple[Bytes, ...] = (*(6 * (change_json,)), repeat_key, change_digits, nest, *BYTES)

# --- YAML

YAML_BOMB = "\n".join(f"k{i}: &k{i} [{', '.join(['x' if i == 0 else f'*k{i - 1}'] * 10)}]" for i in range(9)).encode()


def change_yaml(data: bytes, rng: Random) -> bytes:
    """One flag gets another value, among them tags that would make Python objects, aliases and anchors."""
    lines = data.split(b"\n")
    values = (
        *("!!python/object/apply:os.system ['touch ../" + MARKER + "']", "!!python/name:os.system", "&a [*a]", "*b"),
        *("{a: 1}", "[1, 2]", "!!binary aGk=", "2001-01-01", "1:30", ".inf", "|", ">", "'", "!!set {a, b}", "? x", "~"),
        *(text_of(value).decode("utf-8", "replace") for value in rng.sample(VALUES, 6)),
    )
    at = rng.randrange(len(lines))
    lines[at] = lines[at].split(b":")[0] + b": " + rng.choice(values).encode("utf-8", "replace")
    return b"\n".join(lines)


def add_bomb(data: bytes, rng: Random) -> bytes:
    """Aliases that stand for 10^9 values."""
    key = rng.choice(data.split(b"\n")).split(b":")[0]
    return rng.choice((YAML_BOMB, YAML_BOMB + b"\n" + key + b": *k8"))


YAML: tuple[Bytes, ...] = (*(6 * (change_yaml,)), add_bomb, *TEXT)

# --- Jinja

SNIPPETS = (
    *("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "{{ 'x' * 10 ** 10 }}"),
    *(
        "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
        "{{ 'x' | center(10 ** 10) }}",
        "{{ 10 ** (10 ** 9) }}",
    ),
    *(
        "{% set n = namespace(x='xy') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ '%9999999999d' % 1 }}",
    ),
    *(
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{% include '../secret' %}",
    ),
    *(
        "{{ cycler.__init__.__globals__.os.system('touch ../" + MARKER + "') }}",
        "{% import '/etc/passwd' as x %}",
        "{{ lipsum(9999) }}",
    ),
    *(
        "{{ messages.append(messages) }}",
        "{% do messages.clear() %}",
        "{{ raise_exception('x' * 100000) }}",
        "{{ strftime_now('%Y' * 9999) }}",
    ),
    *(
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{{ messages | tojson(indent=10 ** 9) }}",
        "{{ '{:9999999999}'.format(1) }}",
    ),
    *(
        "{{ messages | map(attribute='content') | join('x' * 9999999) }}",
        "{{ messages[0].content.replace('', 'y' * 9999999) }}",
    ),
    *(
        "{{ range(100000) | list | batch(2) | map('list') | list }}",
        "{% set x %}{% for i in range(99999) %}{{ messages }}{% endfor %}{% endset %}",
    ),
    *(
        "{" * 5000,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if a %}" * 3000,
        "{% generation %}",
        "{{ x.y.z }}",
        "{{ '\ud800' }}",
    ),
)


def change_template(data: bytes, rng: Random) -> bytes:
    """Statements that take time, memory, or what a template must not have, between two others."""
    starts = [i for i in range(len(data)) if data[i : i + 1] == b"{" and data[i - 1 : i] != b"{"]
    at = rng.choice(starts or [0])
    return data[:at] + rng.choice(SNIPPETS).encode("utf-8", "surrogatepass") + data[at:]


JINJA: tuple[Bytes, ...] = (*(8 * (change_template,)), *TEXT)

# --- formats with an inner structure


def change_safetensors_header(data: bytes, rng: Random) -> bytes:
    """Another header, with the length that belongs to it."""
    length = int.from_bytes(data[:8], "little")
    header = rng.choice(JSON)(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def change_pickle(data: bytes, rng: Random) -> bytes:
    """Opcodes in another order, twice, missing or with other arguments."""
    starts = [position for _, _, position in pickletools.genops(data)]
    pieces = [data[a:b] for a, b in zip(starts, [*starts[1:], starts[-1] + 1], strict=True)]
    at, other = rng.randrange(len(pieces)), rng.randrange(len(pieces))
    action = rng.randrange(5)
    if action == 0:
        pieces[at], pieces[other] = pieces[other], pieces[at]
    elif action == 1:
        pieces[at] = pieces[at] * 2
    elif action == 2:
        pieces[at] = b""
    elif action == 3:
        pieces[at] = rng.choice((flip_bits, set_number, truncate))(pieces[at], rng)
    else:
        pieces[at] = rng.choice(
            (b"N", b"}", b"]", b")", b"(", b"0", b"2", b"R", b"\x81", b"b", b"\x85", b"h\0", b"G" + b"\x7f" * 8)
        )
    return b"".join(pieces)


def evil_pickle(data: bytes, rng: Random) -> bytes:
    """A pickle that runs a command, alone or before the rest."""
    evil = pickle.dumps(Evil(), protocol=rng.choice((2, 4)))
    return rng.choice((evil, evil[:-1] + b"0" + data))


def change_zip(data: bytes, rng: Random) -> bytes:
    """Another entry or another content of one, in an archive that is valid."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice([name for name in entries if name.endswith("data.pkl")] * 5 + list(entries))
    action = rng.random()
    if action < 0.7:
        change = (*(4 * (change_pickle,)), evil_pickle, *BYTES) if name.endswith("data.pkl") else BYTES
        entries[name] = rng.choice(change)(entries[name], rng)
    elif action < 0.85:
        entries[rng.choice(PATHS).replace("\0", "")] = entries.pop(name)
    else:
        del entries[name]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    return buffer.getvalue()


def mutators_of(name: str, data: bytes) -> tuple[Bytes, ...]:
    """The mutations that fit a file."""
    suffix = Path(name).suffix
    if suffix == ".safetensors":
        return (*(6 * (change_safetensors_header,)), *BYTES)
    if data.startswith(b"PK"):
        return (*(6 * (change_zip,)), evil_pickle, *BYTES)
    if data.startswith(b"\x80"):
        return (*(6 * (change_pickle,)), evil_pickle, *BYTES)
    if suffix in (".yaml", ".yml"):
        return YAML
    if suffix == ".jinja":
        return JINJA
    if suffix in (".json", ".jsonl"):
        return JSON if is_json(data) else (*(2 * (change_json_line,)), *TEXT)
    return TEXT if b"\0" not in data else BYTES


def change_json_line(data: bytes, rng: Random) -> bytes:
    """One line of JSON changes."""
    lines = data.split(b"\n")
    at = rng.randrange(max(1, len(lines) - 1))
    if is_json(lines[at]):
        lines[at] = rng.choice(JSON)(lines[at], rng)
    return b"\n".join(lines)


def is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


# --- whole files


def change_file(directory: Path, name: str, rng: Random) -> str:
    """A file disappears, is a directory or a link, has another name, or changes places; returns what was done."""
    path, names = directory / name, sorted(p.name for p in directory.iterdir() if p.is_file())
    action = rng.choice(("remove", "rename", "directory", "dangling", "loop", "zeros", "unreadable", "swap", "copy"))
    other = directory / rng.choice(names)
    content = path.read_bytes()
    if action == "swap":
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return f"swap with {other.name}"
    if action == "copy":
        path.with_name(
            rng.choice((path.stem + "2" + path.suffix, "model.safetensors", "pytorch_model.bin", "x"))
        ).write_bytes(content)
        return action
    path.unlink()
    if action == "rename":
        path.with_name("x" + path.name).write_bytes(content)
    elif action == "directory":
        path.mkdir()
    elif action in ("dangling", "loop", "zeros"):
        path.symlink_to({"dangling": "nowhere", "loop": path.name, "zeros": "/dev/zero"}[action])
    elif action == "unreadable":
        path.write_bytes(content)
        path.chmod(0)
    return action


def text_of(value: Any) -> bytes:
    """A value as it may stand in a text."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.encode("utf-8", "surrogatepass")


def place(data: bytes | bytearray, rng: Random) -> int:
    """An offset; half of them near the beginning, where formats have their tables."""
    if not data:
        return 0
    return rng.randrange(min(len(data), 512) if rng.random() < 0.5 else len(data))


def chunk(data: bytes, rng: Random) -> tuple[int, int]:
    start = place(data, rng)
    return start, min(len(data), start + rng.choice((1, 4, 8, 64, 1000)))
