"""Flags of verbs that run a model or an exported program."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bloomlm.errors import ConfigError
from bloomlm.flags import ADAPTER_FLAGS, READING_FLAGS, Flags, flag

NOT_OF_PROGRAMS = {
    **dict.fromkeys(ADAPTER_FLAGS, "adapters are put into a program when it is exported; leave the flag out"),
    **dict.fromkeys(READING_FLAGS, "it concerns files of models and adapters; leave the flag out"),
    "dtype": "a program keeps the precision that it was exported in; leave the flag out, or export it with --dtype",
    "device": "exported programs run on the CPU; leave the flag out",
}
"""Flags that do not go with --model_dir -> why, and what to do instead."""


@dataclass(frozen=True, kw_only=True)
class ProgramFlags(Flags):
    """Which program to run in place of a model."""

    model_dir: Path | None = flag(
        "model", None, "instead of --model_name_or_path: directory that `bloomlm export` wrote a program into"
    )
    model_prefix: str = flag("model", "bloom", "name of the program in --model_dir")


def check_generator(config: Any, not_of_programs: Mapping[str, str]) -> None:
    """Refuse flags that name neither a model nor a program, or both, or that do not go with a program.

    Args:
        config: has the fields of ProgramFlags, and model_name_or_path with an empty default.
        not_of_programs: flags of models -> why they do not go with a program, and what to do instead.

    Raises:
        ConfigError: flags that contradict each other.
    """
    if config.model_dir is None:
        if not config.model_name_or_path:
            raise ConfigError(
                "missing --model_name_or_path (builtin:tiny, a directory, or a hub name), or --model_dir with an "
                "exported program"
            )
        if config.model_prefix != ProgramFlags.model_prefix:
            raise ConfigError("--model_prefix names a program; give its --model_dir too, or leave it out")
        return
    if config.model_name_or_path:
        raise ConfigError(
            f"found --model_dir {config.model_dir} and --model_name_or_path {config.model_name_or_path}; give one: an "
            "exported program or a model"
        )
    given = {item.name for item in fields(config) if getattr(config, item.name) != item.default}
    for name, why in not_of_programs.items():
        if name in given and not (name == "device" and config.device == "cpu"):
            raise ConfigError(f"--{name} with --model_dir: {why}")
