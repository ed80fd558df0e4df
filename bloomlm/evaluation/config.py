"""What to evaluate on: the options of bloomlm.evaluate, which are flags of `bloomlm evaluate` too."""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from bloomlm.errors import ConfigError
from bloomlm.evaluation.protocol import Protocol, Task
from bloomlm.evaluation.protocols import PROTOCOLS
from bloomlm.flags import Flags, flag

C = TypeVar("C")

DEFAULT_PROTOCOL = "reference"
_PROTOCOL_HELP = "definition of the numbers: " + ", ".join(f"{name} ({row.help})" for name, row in PROTOCOLS.items())
_OPTIONS = frozenset(
    item.name for protocol in PROTOCOLS.values() for task in protocol.tasks for item in fields(task.options)
)
"""Names of all options of protocols."""


def _with_protocol_options(config_class: type[C]) -> type[C]:
    """The same dataclass with a field for each option of the protocols; None: the default of the protocol."""
    found: dict[str, tuple[Any, Field[Any], dict[str, Any]]] = {}
    for protocol in PROTOCOLS.values():
        for task in protocol.tasks:
            hints = get_type_hints(task.options)
            for item in fields(task.options):
                _, _, defaults = found.setdefault(item.name, (hints[item.name], item, {}))
                defaults[protocol.name] = item.default
    made = [(name, hint | None, _optional(item, defaults)) for name, (hint, item, defaults) in found.items()]
    namespace = {"__module__": config_class.__module__, "__doc__": config_class.__doc__}
    return make_dataclass(
        config_class.__name__, made, bases=(config_class,), namespace=namespace, frozen=True, kw_only=True
    )


def _optional(item: "Field[Any]", defaults: dict[str, Any]) -> Any:
    """The field of a flag that may be left out; its help names the default, of each protocol where they differ."""
    known = {name: default for name, default in defaults.items() if default not in (None, ())}
    shown = str(next(iter(known.values()), ""))
    if len(set(known.values())) > 1:
        shown = ", ".join(f"{name} {default}" for name, default in known.items())
    help = item.metadata["help"] + (f"  [default: {shown}]" if known else "")
    return field(default=None, metadata={**item.metadata, "help": help})


@_with_protocol_options
@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Flags):
    """What to evaluate on. Each option of a protocol (seq_length, tasks, ...) is a field of this class, too."""

    eval_path: str | None = flag(
        "data", None, "wiki.valid.tokens, lambada_test.jsonl, ...; or wikitext-2, wikitext-103 or lambada from the hub"
    )
    cloze_eval: bool | None = flag(
        "data", None, "whether to guess last words (LAMBADA)  [default: True for .jsonl, .json and .csv files]"
    )
    limit: int | None = flag(
        "data", None, "evaluate only this many examples, documents or windows, from the first", minimum=1
    )
    protocol: str | None = flag(
        "protocol", None, f"{_PROTOCOL_HELP}  [default: {DEFAULT_PROTOCOL}]", choices=tuple(PROTOCOLS)
    )
    do_generation: bool = flag(
        "generation", False, "answer the rows of eval_path (src and tgt) and score the answers: --protocol generation"
    )
    output_file: Path | None = flag(
        "output", None, "write the report (.json, and .md beside it); a stopped evaluation continues from there"
    )
    batch_size: int = flag(
        "computing",
        8,
        "windows of seq_length tokens at once; changes the speed, and is halved when memory runs out",
        minimum=1,
    )

    @property
    def chosen_protocol(self) -> Protocol:
        """The protocol that the options ask for.

        Raises:
            ConfigError: there is no such protocol.
        """
        name = self.protocol or DEFAULT_PROTOCOL
        if self.do_generation:
            name = "generation"
        elif vars(self)["tasks"]:
            name = "lm_eval_tasks"
        if name not in PROTOCOLS:
            raise ConfigError(f"--protocol is {name!r}; expected one of {', '.join(PROTOCOLS)}")
        return PROTOCOLS[name]

    @property
    def task(self) -> Task:
        """The task that the options ask for.

        Raises:
            ConfigError: the protocol does not define it.
        """
        protocol, text = self.chosen_protocol, "lambada" if self.is_lambada else "wikitext"
        task = protocol.task(text)
        if task is None:
            others = [name for name, other in PROTOCOLS.items() if other.reads_text and other.task(text)]
            titles = {"wikitext": "WikiText", "lambada": "LAMBADA"}
            raise ConfigError(
                f"--protocol {protocol.name} has no {titles[text]}, as it defines {titles[protocol.tasks[0].name]} "
                f"only; use {' or '.join(others)}"
            )
        return task

    @property
    def is_lambada(self) -> bool:
        """Whether the data, where they are WikiText or LAMBADA, are LAMBADA."""
        if self.cloze_eval is not None:
            return self.cloze_eval
        name = self.eval_path or ""
        return name.partition(":")[0] == "lambada" or Path(name).suffix.lower() in (".jsonl", ".json", ".csv")

    @property
    def task_options(self) -> dict[str, Any]:
        """The options of the task: those that were given, and the protocol's defaults."""
        given = {item.name: getattr(self, item.name) for item in fields(self.task.options)}
        return vars(self.task.options(**{name: value for name, value in given.items() if value is not None}))


def make_config(options: Mapping[str, Any]) -> EvaluateConfig:
    """A config from keywords; paths may be texts, and tasks a sequence or names with commas between them.

    Raises:
        ConfigError: an unknown option, or a number out of range.
    """
    hints = get_type_hints(EvaluateConfig)
    unknown = [name for name in options if name not in hints]
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r} of evaluate; known: {', '.join(hints)}")
    values = dict(options)
    for name, value in options.items():
        if isinstance(value, (str, Path)):
            values[name] = Path(value) if Path in get_args(hints[name]) else str(value)
    if values.get("tasks"):
        tasks = values["tasks"]
        values["tasks"] = tuple(tasks.split(",") if isinstance(tasks, str) else tasks)
    return EvaluateConfig(**values)


def check_config(config: EvaluateConfig) -> tuple[str, ...]:
    """Refuse options that contradict each other, before anything is loaded.

    Returns:
        What the user should know: options that have no effect.

    Raises:
        ConfigError: naming the flags.
    """
    kinds = [name for name, given in (("--tasks", vars(config)["tasks"]), ("--eval_path", config.eval_path)) if given]
    if config.do_generation and not config.eval_path:
        raise ConfigError("--do_generation needs --eval_path with rows to answer, such as test.jsonl")
    if len(kinds) != 1:
        found = " and ".join(kinds) or "neither"
        raise ConfigError(f"found {found}; expected --eval_path FILE (or wikitext-2, lambada), or --tasks of lm-eval")
    protocol = config.chosen_protocol
    if protocol.reads_file != bool(config.eval_path):
        raise ConfigError(f"--protocol {protocol.name} needs {'--eval_path' if protocol.reads_file else '--tasks'}")
    if config.output_file is not None and config.output_file.suffix != ".json":
        raise ConfigError(f"--output_file {config.output_file}: expected a name that ends in .json")
    return _without_effect(config)


def _without_effect(config: EvaluateConfig) -> tuple[str, ...]:
    """Notices about options that the task does not have."""
    protocol, task = config.chosen_protocol, config.task
    place = f"--protocol {protocol.name}" + (f" on {task.name}" if protocol.reads_text else "")
    unused = {name for name in _OPTIONS - config.task_options.keys() if vars(config)[name] is not None}
    if config.protocol not in (None, protocol.name):
        unused.add("protocol")
    if config.cloze_eval is not None and not protocol.reads_text:
        unused.add("cloze_eval")
    return tuple(f"--{item.name} has no effect with {place}" for item in fields(config) if item.name in unused)
