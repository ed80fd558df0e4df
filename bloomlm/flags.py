"""How the fields of a config dataclass are declared as flags, and the flags that several verbs share.

    @dataclass(frozen=True, kw_only=True)
    class ToyConfig(Flags):
        output_dir: str = flag("output", REQUIRED, "directory to write")
        top_p: float = flag("decoding", 1.0, "draw from the likeliest tokens of this probability", minimum=0, maximum=1)

cli/options.py builds the command from such a class. This file imports the standard library only, so that training and
evaluation can declare their flags without the command line.
"""

import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bloomlm.errors import ConfigError

REQUIRED: Any = MISSING
"""The default of a flag that the user must give."""

# Name in a field's metadata -> the words of the message, and the test, which NaN never passes.
_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "minimum": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "maximum": ("at most", operator.le),
    "below": ("below", operator.lt),
}

_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}

Dtype = Literal["float32", "float16", "bfloat16"]
PrefixLayoutName = Literal["old", "new"]


def flag(
    section: str,
    default: Any,
    help: str,
    *,
    aliases: tuple[str, ...] = (),
    repeatable: bool = False,
    choices: Iterable[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field together with the description of its flag.

    Args:
        section: the heading under which --help lists it.
        default: the value of a flag that is not given, or REQUIRED.
        help: one line, with the unit; --help adds the default unless the line ends in `[default: ...]`.
        aliases: other spellings, such as ("prefix",).
        repeatable: the field is a tuple of texts, and the flag is given once for each, because texts may hold commas.
        choices: the allowed texts, where the type is not a Literal that lists them.
        minimum, maximum: bounds of a number, which are allowed values; None, too, is always allowed.
        above, below: bounds that are not allowed values.
    """
    bounds = {"minimum": minimum, "maximum": maximum, "above": above, "below": below}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    return field(
        default=default,
        metadata={
            "section": section,
            "help": help,
            "aliases": aliases,
            "repeatable": repeatable,
            "choices": tuple(choices),
            **given,
        },
    )


def same_flag(config_class: type[Any], name: str, **changes: Any) -> Any:
    """The field `name` of another config, for a flag that means the same in two verbs.

    Args:
        config_class: the other config.
        name: name of the field in both.
        changes: arguments of `flag` that differ.
    """
    original = next(item for item in fields(config_class) if item.name == name)
    default = changes.pop("default", original.default)
    return field(default=default, metadata={**original.metadata, **changes})


def unescaped(text: str) -> str:
    r"""A text from the command line: \n, \t and \\, which a shell hands over as two characters, become one."""
    return re.sub(r"\\([nt\\])", lambda match: _ESCAPES[match[1]], text)


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Base of every config. A config with a number out of range, or with an unknown choice, cannot be made.

    Raises:
        ConfigError: a value is outside the range or the choices that its flag declares.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            value, choices = getattr(self, item.name), _choices(hints[item.name])
            if value is not None and choices and value not in choices:
                raise ConfigError(f"--{item.name} is {value!r}; expected one of {', '.join(choices)}")
            bounds = [
                (word, holds, item.metadata[name]) for name, (word, holds) in _BOUNDS.items() if name in item.metadata
            ]
            if value is not None and not all(holds(value, bound) for _, holds, bound in bounds):
                expected = " and ".join(f"{word} {bound:g}" for word, _, bound in bounds)
                raise ConfigError(f"--{item.name} is {value}; expected {expected}")


@dataclass(frozen=True, kw_only=True)
class ModelFlags(Flags):
    """Which model and adapter to load, and how to read their files."""

    model_name_or_path: str = flag(
        "model", REQUIRED, "builtin:tiny, a directory, or a hub name such as bigscience/bloom-560m"
    )
    adapter_path: str | None = flag(
        "model", None, "directory or hub name of an adapter of any kind (PEFT's or PaddleNLP's files)"
    )
    lora_path: str | None = flag("model", None, "like --adapter_path, for LoRA adapters only")
    prefix_path: str | None = flag("model", None, "like --adapter_path, for prefix adapters only")
    prefix_layout: PrefixLayoutName | None = flag(
        "model", None, "for a prefix adapter in PaddleNLP's files: old if written before August 2023, else new"
    )
    trained_tensor_parallel_degree: int | None = flag(
        "model",
        None,
        "for an adapter in PaddleNLP's files that do not say: number of ranks that trained it",
        minimum=1,
    )
    paddle_tokenization: bool = flag(
        "model", False, "for a tokenizer in vocab.json and merges.txt: split words as PaddleNLP did, not as BLOOM does"
    )

    @property
    def adapter(self) -> str | None:
        """Path or name of the adapter; None without one."""
        return self.adapter_path or self.lora_path or self.prefix_path

    def load_options(self) -> dict[str, Any]:
        """The adapter and how to read the files, as keyword arguments of bloomlm.load."""
        return {name: getattr(self, name) for name in ADAPTER_FLAGS} | reading_flags(self)


ADAPTER_FLAGS = ("adapter_path", "lora_path", "prefix_path")
READING_FLAGS = ("prefix_layout", "trained_tensor_parallel_degree", "paddle_tokenization")
"""Flags of ModelFlags that say how to read PaddleNLP's files."""


def reading_flags(config: Any) -> dict[str, Any]:
    """READING_FLAGS of a config that has them, as keyword arguments."""
    return {name: getattr(config, name) for name in READING_FLAGS}


@dataclass(frozen=True, kw_only=True)
class DeviceFlags(Flags):
    """Precision and device of a loaded model."""

    dtype: Dtype | None = flag("model", None, "precision of the weights  [default: as in the files]")
    device: str | None = flag(
        "model", None, "cpu, gpu, cuda:1, ...: where to compute  [default: a GPU if there is one]"
    )


def _choices(hint: Any) -> tuple[str, ...]:
    """The values of a Literal, or of a Literal in a union with None; () for other types."""
    return next((get_args(option) for option in (hint, *get_args(hint)) if get_origin(option) is Literal), ())
