"""`bloomlm evaluate`: bloomlm.evaluate with flags, a progress bar and tables."""

from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from bloomlm.api import LoadedModel, load
from bloomlm.api import evaluate as evaluate_model
from bloomlm.cli.generator import NOT_OF_PROGRAMS, ProgramFlags, check_generator
from bloomlm.cli.options import config_command
from bloomlm.errors import ConfigError
from bloomlm.evaluation.config import EvaluateConfig, check_config
from bloomlm.evaluation.report import EvaluationReport, compare, read_report
from bloomlm.flags import DeviceFlags, ModelFlags, flag, same_flag
from bloomlm.parallel.launch import find_device, joined_ranks, world_size
from bloomlm.parallel.mesh import Mesh, degrees_from_flags
from bloomlm.runtime.program import Program

_NOT_OF_PROGRAMS = {
    **NOT_OF_PROGRAMS,
    "load_autodist": "auto_dist files hold a model; give their directory as --model_name_or_path",
    "tensor_parallel_degree": "a program cannot be divided among processes; leave the flag out, and each process "
    "takes other examples",
}


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags(EvaluateConfig, ProgramFlags, DeviceFlags, ModelFlags):
    """The flags of `bloomlm evaluate`."""

    model_name_or_path: str = same_flag(ModelFlags, "model_name_or_path", default="")
    model_type: str | None = flag("model", None, "accepted for old commands; bloom is the only one")
    load_autodist: bool = flag(
        "model", False, "check that the directory holds auto_dist*.pdparams files, which are read in any case"
    )
    compare: tuple[str, ...] = flag("output", (), "show two reports side by side and evaluate nothing")
    logging_steps: int = flag(
        "output", 10, "where there is no terminal: batches between two lines of progress", minimum=1
    )
    tensor_parallel_degree: int = flag(
        "computing", 1, "processes that compute one copy of the model together; others take other examples"
    )
    seed: int | None = flag("computing", None, "accepted for old commands; an evaluation draws no random numbers")


def check_flags(flags: EvaluateFlags) -> tuple[str, ...]:
    """Refuse flags that contradict each other, before anything is loaded.

    Returns:
        Notices about flags without effect, except those that are options of bloomlm.evaluate, which has its own.

    Raises:
        ConfigError: flags that contradict each other.
    """
    given = {item.name for item in fields(flags) if getattr(flags, item.name) != item.default}
    if flags.compare:
        if len(flags.compare) != 2:
            raise ConfigError(f"--compare takes two reports, found {len(flags.compare)}: --compare a.json b.json")
        names = [item.name for item in fields(flags) if item.name in given - {"compare"}]
        return tuple(f"--{name} has no effect with --compare" for name in names)
    if flags.model_type not in (None, "bloom"):
        raise ConfigError(f"--model_type {flags.model_type}: bloomlm evaluates BLOOM only; expected bloom")
    check_generator(flags, _NOT_OF_PROGRAMS)
    _check_autodist(flags)
    check_config(flags)
    acting = {
        "logging_steps": (flags.chosen_protocol.reads_file, "--eval_path"),
        "seed": (False, "random numbers, which an evaluation does not draw"),
    }
    return tuple(
        f"--{name} has no effect without {needed}"
        for name, (acts, needed) in acting.items()
        if name in given and not acts
    )


def _check_autodist(flags: EvaluateFlags) -> None:
    if flags.load_autodist:
        directory = Path(flags.model_name_or_path).expanduser()
        if not list(directory.glob("auto_dist*.pdparams")):
            raise ConfigError(
                f"--load_autodist: {flags.model_name_or_path} holds no auto_dist*.pdparams; leave the flag out, and "
                "the model is read in whatever form it has"
            )


class EvaluationDisplay:
    """Prints notices, and a progress bar on a terminal or lines anywhere else.

    Args:
        console: where to print.
        logging_steps: batches between two lines.
    """

    def __init__(self, console: Console, *, logging_steps: int) -> None:
        self._console = console
        self._logging_steps = logging_steps
        self._num_calls = 0
        columns = (
            TextColumn("evaluating"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[result]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task: TaskID | None = None

    def __enter__(self) -> "EvaluationDisplay":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def notice(self, text: str) -> None:
        """Print a notice."""
        self._console.print(text, style="yellow", soft_wrap=True)

    def progress(self, num_done: int, total: int, result: str) -> None:
        """Update the bar, or print a line if one is due."""
        if self._task is None:
            self._task = self._progress.add_task("evaluating", total=total, result="")
            self._progress.start()
        self._progress.update(self._task, completed=num_done, result=result)
        is_due = self._num_calls % self._logging_steps == 0 or num_done == total
        if is_due and num_done and not self._console.is_terminal:
            self._console.print(f"{num_done}/{total}  {result}".rstrip(), markup=False, highlight=False)
        self._num_calls += 1


def evaluate(flags: EvaluateFlags) -> None:
    """Run `bloomlm evaluate`.

    Raises:
        BloomlmError: flags, files or data that cannot be used.
    """
    notices = check_flags(flags)
    options = {item.name: getattr(flags, item.name) for item in fields(EvaluateConfig)}
    # Programs run on the CPU, even where there is a GPU.
    device = find_device(flags.device if flags.model_dir is None else "cpu")
    degrees = degrees_from_flags(world_size(), tensor_parallel_degree=flags.tensor_parallel_degree)
    if degrees.world_size > 1 and device.index is not None:
        raise ConfigError(f"--device {flags.device}: every process uses another GPU; give gpu or cpu")
    with joined_ranks(degrees, device.type) as mesh:
        messages = Console(stderr=True, highlight=False, markup=False, quiet=not mesh.is_main)
        with EvaluationDisplay(messages, logging_steps=flags.logging_steps) as display:
            for notice in notices:
                display.notice(notice)
            if flags.compare:
                if mesh.is_main:
                    _compare(Path(flags.compare[0]), Path(flags.compare[1]), display)
                return
            report = evaluate_model(lambda: _open(flags, device, mesh), mesh=mesh, display=display, **options)
        if mesh.is_main:
            _show(flags, report, messages)


def _open(flags: EvaluateFlags, device: torch.device, mesh: Mesh) -> LoadedModel | Program:
    if flags.model_dir is not None:
        return Program(flags.model_dir / flags.model_prefix)
    return load(flags.model_name_or_path, **flags.load_options(), dtype=flags.dtype, device=device, mesh=mesh)


def _show(flags: EvaluateFlags, report: EvaluationReport, messages: Console) -> None:
    if flags.task.line is not None:
        click.echo(f" validation results on {flags.eval_path} | {flags.task.line(report.metrics, report.counts)}")
    console = Console()
    console.print(report.title, markup=False, highlight=False, soft_wrap=True)
    console.print(report.to_table())
    speed = report.run.get("tokens_per_second")
    rate = f" ({speed:,.0f} tokens/s)" if speed else ""
    messages.print(f"{report.run['seconds']:.1f} s{rate} on {report.run['device']}", style="dim")
    if flags.output_file is not None:
        messages.print(f"report in {flags.output_file} and {flags.output_file.with_suffix('.md')}", soft_wrap=True)


def _compare(first: Path, second: Path, display: EvaluationDisplay) -> None:
    comparison = compare(read_report(first), read_report(second))
    Console().print(comparison.to_table(str(first), str(second)))
    for notice in comparison.notices:
        display.notice(notice)


def _two_files(command: click.Command) -> click.Command:
    """Make --compare of a command take two words: --compare a.json b.json."""
    option = next(param for param in command.params if param.name == "compare")
    option.nargs, option.type, option.metavar = 2, click.STRING, "A.json B.json"
    return command


command = _two_files(
    config_command(
        "evaluate",
        EvaluateFlags,
        evaluate,
        has_ranks=True,
        help="""Measure how good a model is: WikiText, LAMBADA, any task of lm-eval, or answers to rows of your own.

    --protocol names the definition of the numbers; only numbers under the same definition can be compared.

    \b
    bloomlm evaluate --model_name_or_path bigscience/bloom-560m --eval_path wikitext-2 --protocol lm_eval \\
        --output_file wikitext.json
    bloomlm evaluate --compare before.json after.json
    """,
    )
)
