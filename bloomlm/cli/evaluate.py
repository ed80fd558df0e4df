"""`bloomlm evaluate`: how good a model is, under a stated definition."""

import logging
import os
from pathlib import Path

import click
import torch
from rich.console import Console

from bloomlm.checkpoint.main_rank import main_first
from bloomlm.cli.device import find_device
from bloomlm.cli.evaluate_runs import EvaluationRun
from bloomlm.cli.evaluate_subject import load_subject
from bloomlm.cli.options import config_command
from bloomlm.errors import ConfigError
from bloomlm.evaluation.compare import compare
from bloomlm.evaluation.config import EvaluateConfig, check_config
from bloomlm.evaluation.named_data import find_data
from bloomlm.evaluation.report import Report, read_report
from bloomlm.parallel.launch import joined_ranks, world_size
from bloomlm.parallel.mesh import Mesh, degrees_from_flags

_LOG = logging.getLogger(__name__)


def evaluate(config: EvaluateConfig) -> None:
    """Run `bloomlm evaluate`.

    Raises:
        BloomlmError: flags, files or data that cannot be used.
    """
    notices = check_config(config)
    # programs run on the CPU, whatever else there is
    device = find_device(config.device if config.model_dir is None else "cpu")
    degrees = degrees_from_flags(world_size(), tensor_parallel_degree=config.tensor_parallel_degree)
    if degrees.world_size > 1 and device.index is not None:
        raise ConfigError(f"--device {config.device}: every process takes a GPU of its own; give gpu or cpu")
    with joined_ranks(degrees, device.type) as mesh:
        for notice in notices:
            _LOG.warning("%s", notice)
        if config.compare:
            if mesh.is_main:
                _compare(*map(Path, config.compare))
        else:
            _evaluate(config, device, mesh)


def _evaluate(config: EvaluateConfig, device: torch.device, mesh: Mesh) -> None:
    messages = Console(stderr=True, highlight=False, markup=False, quiet=not mesh.is_main)
    if config.output_file is not None:
        _check_writable(config.output_file)
    # what the data lack shows before a large model is read
    eval_path, is_raw = config.eval_path, config.protocol != "reference"
    path = None if eval_path is None else main_first(lambda: find_data(eval_path, raw=is_raw), mesh)
    run = EvaluationRun(config, load_subject(config, device, mesh), messages)
    if path is None:
        report = run.tasks()
    elif config.do_generation:
        report = run.generation(path)
    else:
        report = run.protocol(path)
    if mesh.is_main:
        _show(config, report, messages)


def _check_writable(output_file: Path) -> None:
    """Refuse now what would be refused after hours."""
    directory = output_file.parent
    while not directory.exists():
        directory = directory.parent
    if output_file.is_dir() or not directory.is_dir() or not os.access(directory, os.W_OK):
        raise ConfigError(f"--output_file {output_file} cannot be written; give a file in a directory that can")


def _show(config: EvaluateConfig, report: Report, messages: Console) -> None:
    console = Console()
    console.print(report.title, markup=False, highlight=False, soft_wrap=True)
    console.print(report.to_table())
    speed = report.run.get("tokens_per_second")
    rate = f" ({speed:,.0f} tokens/s)" if speed else ""
    messages.print(f"{report.run['seconds']:.1f} s{rate} on {report.run['device']}", style="dim")
    if config.output_file is not None:
        messages.print(f"report in {config.output_file} and {config.output_file.with_suffix('.md')}", soft_wrap=True)


def _compare(first: Path, second: Path) -> None:
    comparison = compare(read_report(first), read_report(second))
    Console().print(comparison.to_table(str(first), str(second)))
    messages = Console(stderr=True, highlight=False, markup=False)
    for notice in comparison.notices:
        messages.print(notice, style="yellow", soft_wrap=True)


def _two_files(command: click.Command) -> click.Command:
    """The same command, where --compare takes two words: --compare a.json b.json."""
    flag = click.Option(
        ["--compare"],
        nargs=2,
        type=click.STRING,
        metavar="A.json B.json",
        help="two reports, side by side; nothing is evaluated",
    )
    command.params = [flag if param.name == "compare" else param for param in command.params]
    return command


command = _two_files(
    config_command(
        "evaluate",
        EvaluateConfig,
        evaluate,
        help="""Tell how good a model is: WikiText, LAMBADA, any task of lm-eval, or answers to rows of your own.

    The numbers hold under the definition that --protocol names; compare them with numbers of the same one only.

    \b
    bloomlm evaluate --model_name_or_path bigscience/bloom-560m --eval_path wikitext-2 --protocol lm_eval \\
        --output_file wikitext.json
    """,
    )
)
