"""The options of bloomlm.evaluate about data, protocol and output, which `bloomlm evaluate` has as flags."""

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
"""The names of the options of all protocols."""


def _with_protocol_options(config_class: type[C]) -> type[C]:
    """The same dataclass with a field for each option of the protocols; None stands for the protocol's default."""
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
    """The field for an option; its help names the default, or that of each protocol if they differ."""
    known = {name: default for name, default in defaults.items() if default not in (None, ())}
    shown = str(next(iter(known.values()), ""))
    if len(set(known.values())) > 1:
        shown = ", ".join(f"{name} {default}" for name, default in known.items())
    help = item.metadata["help"] + (f"  [default: {shown}]" if known else "")
    return field(default=None, metadata={**item.metadata, "help": help})


@_with_protocol_options
@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Flags):
    """Data, protocol and output. Each option of a protocol (seq_length, tasks, ...) is a field of this class, too."""

    eval_path: str | None = flag(
        "data",
        None,
        "a file such as wiki.valid.tokens or lambada_test.jsonl; or wikitext-2, wikitext-103, lambada (hub)",
    )
    cloze_eval: bool | None = flag(
        "data", None, "True: LAMBADA, False: WikiText  [default: True for .jsonl, .json and .csv files]"
    )
    limit: int | None = flag(
        "data", None, "number of examples, documents or windows to evaluate, from the first  [default: all]", minimum=1
    )
    protocol: str | None = flag(
        "protocol", None, f"{_PROTOCOL_HELP}  [default: {DEFAULT_PROTOCOL}]", choices=tuple(PROTOCOLS)
    )
    do_generation: bool = flag(
        "generation", False, "the same as --protocol generation: answer the rows of --eval_path and score the answers"
    )
    output_file: Path | None = flag(
        "output", None, "write the report (.json, and .md beside it); the same command resumes a stopped evaluation"
    )
    batch_size: int = flag(
        "computing",
        8,
        "windows of seq_length tokens, or prompts, at once; changes only the speed; halved when memory runs out",
        minimum=1,
    )

    @property
    def chosen_protocol(self) -> Protocol:
        """The protocol that the options choose.

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
        """The task of the protocol that fits the data.

        Raises:
            ConfigError: the protocol has no such task.
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
        """Whether data that are WikiText or LAMBADA are LAMBADA."""
        if self.cloze_eval is not None:
            return self.cloze_eval
        name = self.eval_path or ""
        return name.partition(":")[0] == "lambada" or Path(name).suffix.lower() in (".jsonl", ".json", ".csv")

    @property
    def task_options(self) -> dict[str, Any]:
        """The options of the task, with the protocol's defaults for those that are not given."""
        given = {item.name: getattr(self, item.name) for item in fields(self.task.options)}
        return vars(self.task.options(**{name: value for name, value in given.items() if value is not None}))


def make_config(options: Mapping[str, Any]) -> EvaluateConfig:
    """A config from keyword arguments; paths may be texts, and tasks a sequence or one text with commas.

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
        Notices about options without effect.

    Raises:
        ConfigError: options that contradict each other.
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
