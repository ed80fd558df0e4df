"""`bloomlm doctor`: what this machine is, whether it computes correctly, and what is slow and why."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import click
from rich.console import Console

from bloomlm.cli.options import config_command
from bloomlm.diagnosis import machine
from bloomlm.diagnosis.self_test import MODEL, Check, self_test
from bloomlm.errors import format_bytes
from bloomlm.flags import DeviceFlags, Flags, flag, same_flag
from bloomlm.parallel.launch import find_device

FAILED = 1
"""Exit status if a check failed."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig(Flags):
    """The flags of `bloomlm doctor`."""

    device: str | None = same_flag(
        DeviceFlags,
        "device",
        section="doctor",
        help="cpu, gpu, cuda:1, ...: what to test  [default: a GPU if there is one]",
    )
    json: bool = flag("doctor", False, "print one JSON object instead of lines")


def doctor(config: DoctorConfig) -> None:
    """Print facts, checks and advice; the exit status is 1 if a check failed."""
    device = find_device(config.device)
    console = Console(highlight=False, markup=False, quiet=config.json)
    facts: dict[str, Any] = {"software": machine.software(), "processor": machine.processor(), "gpus": machine.gpus()}
    for title, values in facts.items():
        _show(console, title, values)
    console.print(f"\nself-test of {device} on {MODEL}, against float64 on the CPU")
    checks = []
    for check in self_test(device):
        checks.append(check)
        console.print(_line(check), soft_wrap=True)
    facts["speed"] = machine.speed(device)
    _show(console, f"speed of {device}", facts["speed"])
    notes = list(machine.advice(facts["processor"], facts["gpus"], facts["speed"]))
    console.print("\nadvice")
    for note in notes or ["nothing to improve was found"]:
        console.print(f"  {note}", soft_wrap=True)
    failed = [check.name for check in checks if not check.passed]
    outcome = f"{len(failed)} of {len(checks)} checks FAILED" if failed else f"all {len(checks)} checks passed"
    console.print(f"\n{outcome} on {device}")
    if config.json:
        report = {"device": str(device), **facts, "checks": [asdict(c) | {"passed": c.passed} for c in checks]}
        click.echo(json.dumps(report | {"advice": notes}, indent=2))
    if failed:
        click.get_current_context().exit(FAILED)


def _line(check: Check) -> str:
    if check.error is None:
        result = str(check.problem)
    else:
        result = f"relative error {check.error:.1e}, limit {check.limit:.0e}"
    return f"  {'ok    ' if check.passed else 'FAILED'}  {check.name}: {result} ({check.seconds:.1f} s)"


def _show(console: Console, title: str, values: dict[str, Any], indent: str = "") -> None:
    console.print(f"{indent}{title}" if indent else f"\n{title}")
    for name, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for number, item in enumerate(value):
                _show(console, f"{name} {number}", item, indent + "  ")
        elif isinstance(value, dict):
            _show(console, name, value, indent + "  ")
        else:
            console.print(f"{indent}  {name.removesuffix('_bytes')}: {_text(name, value)}", soft_wrap=True)


def _text(name: str, value: Any) -> str:
    """A value as a person reads it; the unit stands at the end of its name."""
    if value is None or value == []:
        return "none"
    if name.endswith("_flops_per_second"):
        return f"{value / 1e9:,.0f} GFLOP/s"
    if name.endswith("_bytes_per_second"):
        return f"{format_bytes(value)}/s"
    if name.endswith("_bytes"):
        return format_bytes(value)
    if name.endswith("_seconds"):
        return f"{value * 1e6:.1f} microseconds"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


command = config_command(
    "doctor",
    DoctorConfig,
    doctor,
    help="""Test whether this machine computes correctly, and show what a bug report needs.

    Prints versions, devices and memory, compares a device with float64 on the CPU on the built-in model (forward,
    backward, packing, LoRA steps, generation; fp32, bf16, fp16), and says what is slow and why. It takes under a
    minute, needs no network, and exits with 1 if a check failed.

    \b
    bloomlm doctor
    bloomlm doctor --device cpu --json
    """,
)
