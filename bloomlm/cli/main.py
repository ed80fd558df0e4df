"""The `bloomlm` command: imports the file of the verb, runs it, and turns errors into one clear line."""

import difflib
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from bloomlm.allocator import bound_product_caches, keep_freed_memory
from bloomlm.errors import BloomlmError
from bloomlm.version import __version__

# verb -> (its module, the line that `bloomlm --help` shows). The module holds `command`.
VERBS = {
    "demo": ("bloomlm.cli.demo", "see fine-tuning at work: built-in model and data, a few minutes on a CPU"),
    "finetune": ("bloomlm.cli.finetune", "train a BLOOM on your examples: fully, with LoRA or with prefix tuning"),
    "predict": ("bloomlm.cli.predict", "complete prompts with a BLOOM, with or without an adapter"),
    "chat": ("bloomlm.cli.chat", "talk with a model in the terminal"),
    "export": (
        "bloomlm.cli.export",
        "turn a model into a program that runs without its code, also for ONNX, OpenVINO, llama.cpp",
    ),
    "infer": ("bloomlm.cli.infer", "complete prompts with an exported program"),
    "serve": (
        "bloomlm.cli.serve",
        "answer OpenAI's clients, with adapters by name and a page to write with",
    ),
    "evaluate": (
        "bloomlm.cli.evaluate",
        "measure how good a model is on WikiText, LAMBADA, tasks of lm-eval or your own rows",
    ),
    "merge": ("bloomlm.cli.merge", "merge a LoRA into its model, join shards, or change the precision"),
    "trim": ("bloomlm.cli.trim", "cut the vocabulary to the tokens that your languages need, and report the cost"),
    "extend": ("bloomlm.cli.extend", "add tokens for a language that the model writes in many small pieces"),
    "plan": ("bloomlm.cli.plan", "compute memory, traffic and time of a job before it runs"),
    "doctor": ("bloomlm.cli.doctor", "test whether this machine computes correctly, and show what a bug report needs"),
    "convert": (
        "bloomlm.cli.convert",
        "convert a model or an adapter to or from another program's files",
    ),
}

_EXIT_USER_ERROR = 2
_EXIT_INTERRUPTED = 130


class _Verbs(click.Group):
    """A group that imports a verb's module only when that verb is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of the table."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the verb's module and return its command."""
        if cmd_name not in VERBS:
            return None
        return _command_of(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb; an unknown one is an error that names the nearest."""
        if args[0] not in VERBS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "`bloomlm --help` lists the verbs."
            raise click.UsageError(f"unknown verb {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs from the table, without importing any."""
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, summary) for verb, (_, summary) in VERBS.items()])


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"bloomlm {__version__}")
        ctx.exit()


group = _Verbs(
    "bloomlm",
    help="Fine-tune and run the BLOOM and BLOOMZ language models.",
    epilog="`bloomlm VERB --help` explains the flags of a verb.",
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_version,
            help="Show the version and exit.",
        )
    ],
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 110},
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `bloomlm` and exit with 0 (done), 2 (an error that the user can correct) or 130 (interrupted).

    Args:
        arguments: the words after `bloomlm`; None: the arguments of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    _exit_with(group, words or ["--help"], "bloomlm")


def run_verb(verb: str) -> NoReturn:
    """Run one verb with the arguments of this process, for the scripts in the repository's root."""
    _exit_with(_command_of(verb), sys.argv[1:], sys.argv[0])


def _command_of(verb: str) -> click.Command:
    """Import the module of a verb.

    The first import brings PyTorch, whose objects stay. Not looking for garbage among them, now or later, saves a
    fifth of a second.
    """
    name = VERBS[verb][0]
    if name not in sys.modules:
        gc.disable()
        try:
            importlib.import_module(name)
        finally:
            gc.freeze()
            gc.enable()
    command = sys.modules[name].command
    assert isinstance(command, click.Command)
    return command


def _exit_with(command: click.Command, arguments: list[str], program: str) -> NoReturn:
    keep_freed_memory()  # the process runs nothing else
    bound_product_caches()
    wants_traceback = os.environ.get("BLOOMLM_DEBUG") == "1"
    try:
        status = command.main(args=arguments, prog_name=program, standalone_mode=False)
    except click.ClickException as error:
        _report(_click_message(error))
        sys.exit(_EXIT_USER_ERROR)
    except BloomlmError as error:
        if wants_traceback:
            raise
        _report(str(error), getattr(error, "__notes__", ()))
        sys.exit(_EXIT_USER_ERROR)
    except (click.Abort, KeyboardInterrupt):
        if wants_traceback:
            raise
        _report("interrupted")
        sys.exit(_EXIT_INTERRUPTED)
    # click returns the status of ctx.exit() (--help, --version) and otherwise what the command returned.
    sys.exit(status if isinstance(status, int) else 0)


def _click_message(error: click.ClickException) -> str:
    message = error.format_message()
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{message}\n       `{error.ctx.command_path} --help` lists the flags."
    return message


def _report(message: str, notes: Sequence[str] = ()) -> None:
    """Print an error once on each machine.

    Before the ranks have joined, all of them fail with the same error, and local rank 0 prints it. Afterwards the error
    has a note with the number of its rank, which prints it.
    """
    if notes or os.environ.get("LOCAL_RANK", "0") == "0":
        where = "" if not notes or notes[0].startswith("on rank 0 ") else f" {notes[0]}"
        click.echo(f"error{where}: {message}", err=True)
