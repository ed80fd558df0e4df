"""Turns a config dataclass into a command, whatever its fields mean.

Each field becomes a flag of the same name; flags.py declares its help, section and aliases. A boolean is given as
`--x`, `--x True` or `--x False`; dashes and underscores are the same. `--config run.yaml` takes the same names, and a
flag on the command line wins over the file.
"""

import difflib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import click

from bloomlm.cli.processes import ProcessFlags, start_ranks, starts_ranks
from bloomlm.errors import ConfigError
from bloomlm.files.flag_file import read_flag_file
from bloomlm.flags import Flags

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # generic from click 8.4 on only

_CONFIG_OPTION = click.Option(
    ["--config"],
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="read flags from a YAML file of `name: value` lines; flags given here win over it",
)
_WORDS = "bloomlm.words"
"""Key of click's meta dictionary under which a command keeps its arguments as they were given."""

C = TypeVar("C", bound=Flags)


class NameList(_ParamType):
    """Names separated by commas; a run file may give a list, too."""

    name = "a,b,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Return the names without surrounding blanks."""
        if isinstance(value, tuple):
            return value
        return tuple(name.strip() for name in str(value).split(",") if name.strip())


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One field of a config dataclass as the command line sees it."""

    name: str
    type: _ParamType
    is_optional: bool
    default: Any
    help: str
    section: str
    aliases: tuple[str, ...]
    is_repeatable: bool

    def described(self) -> str:
        """The help line, ending in the default."""
        if self.default is MISSING:
            return f"{self.help}  [required]"
        if self.default in (None, "", ()) or "[default:" in self.help:
            return self.help
        text = ",".join(self.default) if isinstance(self.default, tuple) else str(self.default)
        return f"{self.help}  [default: {f'{self.default:g}' if isinstance(self.default, float) else text}]"

    def parse(self, value: Any, where: str) -> Any:
        """Convert a value of a run file by the rules of the command line.

        Args:
            value: a scalar or a list, as YAML reads it.
            where: the file, for the message.
        Raises:
            ConfigError: the value is not of the flag's type.
        """
        if value is None:
            if self.is_optional:
                return None
            raise ConfigError(f"{where}: {self.name} is empty; expected {_expected(self.type)}, or leave it out")
        if self.is_repeatable:
            return tuple(str(item) for item in value) if isinstance(value, (list, tuple)) else (str(value),)
        if isinstance(value, (list, tuple)) and isinstance(self.type, NameList):
            return tuple(str(item) for item in value)
        if not isinstance(value, (str, int, float)):
            raise ConfigError(f"{where}: {self.name} is {value!r}; expected {_expected(self.type)}")
        try:
            return self.type.convert(str(value), None, None)
        except click.BadParameter as error:
            raise ConfigError(f"{where}: {self.name} is {value!r}; expected {_expected(self.type)}") from error


def config_command(
    name: str,
    config_class: type[C],
    run: Callable[[C], None],
    *,
    help: str,
    has_ranks: bool = False,
    ends_by_signal: bool = False,
) -> click.Command:
    """Build a command with a flag for each field of `config_class`.

    Args:
        name: the verb.
        config_class: a dataclass with keyword arguments.
        run: receives the finished config.
        help: what the verb does; the first line is its summary.
        has_ranks: whether many processes can do it together, which --num_processes then starts.
        ends_by_signal: whether SIGTERM and SIGINT are the verb's normal end.
    """
    process_flags = config_flags(ProcessFlags) if has_ranks else ()
    flags = (*config_flags(config_class), *process_flags)

    def callback(**values: Any) -> None:
        config_file = values.pop("config")
        given = {key: value for key, value in values.items() if value is not None}
        joined = join_values(flags, given, config_file)
        processes = ProcessFlags(**{flag.name: joined.pop(flag.name) for flag in process_flags if flag.name in joined})
        config = config_class(**joined)
        if starts_ranks(processes):
            words = [name, *click.get_current_context().meta[_WORDS]]
            start_ranks(processes, words, ends_by_signal=ends_by_signal)
        else:
            run(config)

    return _SectionedCommand(
        name,
        callback=callback,
        params=[_CONFIG_OPTION, *(_option(flag) for flag in flags)],
        help=help,
        sections={flag.name: flag.section for flag in flags},
        context_settings={
            "token_normalize_func": lambda token: token.replace("-", "_"),
            "help_option_names": ["--help", "-h"],
            "max_content_width": 110,
        },
    )


def config_flags(config_class: type[Flags]) -> tuple[Flag, ...]:
    """Read the flags from a dataclass, in the order of its fields."""
    hints = get_type_hints(config_class)
    return tuple(_flag(item, hints[item.name]) for item in fields(config_class))


def join_values(flags: tuple[Flag, ...], given: Mapping[str, Any], config_file: Path | None) -> dict[str, Any]:
    """Join the run file and the flags given on the command line; the flags win.

    Raises:
        ConfigError: the file cannot be read, has a key or a value that does not fit, or a required flag is missing.
    """
    values = {**(read_run_file(config_file, flags) if config_file else {}), **given}
    missing = [flag for flag in flags if flag.default is MISSING and flag.name not in values]
    if missing:
        lines = "; ".join(f"--{flag.name} ({flag.help})" for flag in missing)
        where = f", which {config_file} does not give either" if config_file else ""
        raise ConfigError(f"missing {lines}{where}")
    return values


def read_run_file(path: Path, flags: tuple[Flag, ...]) -> dict[str, Any]:
    """Read `--config`: a YAML mapping from flag names to values.

    Raises:
        ConfigError: as for `join_values`.
    """
    try:
        content = read_flag_file(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read --config {path}: {error}") from error
    known = {spelling: flag for flag in flags for spelling in (flag.name, *flag.aliases)}
    values: dict[str, Any] = {}
    for key, value in content.items():
        flag = known.get(str(key).lstrip("-").replace("-", "_"))
        if flag is None:
            raise ConfigError(f"{path}: unknown key {key!r}{_nearest(str(key), known)}")
        if flag.name in values:
            raise ConfigError(f"{path}: {flag.name} is given twice; keep one of its spellings")
        values[flag.name] = flag.parse(value, str(path))
    return values


class _SectionedCommand(click.Command):
    """A command whose --help groups flags by section."""

    def __init__(self, name: str, *, sections: Mapping[str, str], **attributes: Any) -> None:
        super().__init__(name, **attributes)
        self.sections = sections

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments, which started ranks get, too, and parse them."""
        ctx.meta[_WORDS] = tuple(args)
        return super().parse_args(ctx, self._join_names(args))

    def _join_names(self, args: Sequence[str]) -> list[str]:
        """`--corpus a b` -> `--corpus a,b`: a list of names may be given as several words."""
        lists = {spelling for param in self.params if isinstance(param.type, NameList) for spelling in param.opts}
        joined: list[str] = []
        num_names: int | None = None  # names since the flag, where it takes a list
        for word in args:
            if word.startswith("-"):
                num_names = 0 if f"--{word.lstrip('-').replace('-', '_')}" in lists else None
                joined.append(word)
            elif num_names:
                joined[-1] += f",{word}"
            else:
                joined.append(word)
                num_names = None if num_names is None else 1
        return joined

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one definition list per section."""
        rows: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                section = self.sections.get(param.name or "", "general")
                rows.setdefault(section, []).append(record)
        for section, records in rows.items():
            with formatter.section(section.capitalize()):
                formatter.write_dl(records, col_max=34)


def _option(flag: Flag) -> click.Option:
    # click gets no defaults: a flag that is not given must not override the run file.
    spellings = [flag.name, *(f"--{spelling}" for spelling in (flag.name, *flag.aliases))]
    attributes: dict[str, Any] = {}
    if flag.type is click.BOOL:
        attributes = {"is_flag": False, "flag_value": "True", "metavar": "[True|False]"}
    elif flag.is_repeatable:
        attributes = {"multiple": True, "callback": lambda ctx, param, value: value or None}
    elif isinstance(flag.type, click.Choice):
        attributes = {"metavar": f"[{'|'.join(flag.type.choices)}]"}
    return click.Option(spellings, type=flag.type, default=None, help=flag.described(), **attributes)


def _flag(item: Field[Any], hint: Any) -> Flag:
    hint, is_optional = _without_none(hint)
    default = item.default
    if default is MISSING and item.default_factory is not MISSING:
        default = item.default_factory()
    return Flag(
        name=item.name,
        type=_parameter_type(hint, item),
        is_optional=is_optional,
        default=default,
        help=item.metadata.get("help", ""),
        section=item.metadata.get("section", "general"),
        aliases=tuple(item.metadata.get("aliases", ())),
        is_repeatable=bool(item.metadata.get("repeatable", False)),
    )


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        assert len(members) == 1, f"a flag has one type, found {hint}"
        return members[0], True
    return hint, False


def _parameter_type(hint: Any, item: Field[Any]) -> _ParamType:
    if item.metadata.get("repeatable"):
        return click.STRING
    choices = get_args(hint) if get_origin(hint) is Literal else item.metadata.get("choices")
    if choices:
        return click.Choice([str(value) for value in choices], case_sensitive=False)
    simple: dict[Any, _ParamType] = {
        bool: click.BOOL,
        int: click.INT,
        float: click.FLOAT,
        str: click.STRING,
        Path: click.Path(path_type=Path),
    }
    if hint in simple:
        return simple[hint]
    assert get_origin(hint) is tuple, f"no flag can be made of {item.name}: {hint}"
    return NameList()


def _expected(param_type: _ParamType) -> str:
    if isinstance(param_type, click.Choice):
        return "one of " + ", ".join(param_type.choices)
    names = {click.BOOL: "True or False", click.INT: "a whole number", click.FLOAT: "a number", click.STRING: "a text"}
    return names.get(param_type, "a path" if isinstance(param_type, click.Path) else "names separated by commas")


def _nearest(key: str, known: Mapping[str, Flag]) -> str:
    close = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "; `--help` lists the names"
