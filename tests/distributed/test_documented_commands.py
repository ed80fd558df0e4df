"""Every command of README.md, docs/ and each verb's --help runs: on the built-in model, with two processes where the page has more, in small.

A block is run, or stands in NOT_RUN with the reason, or shows what a program prints (SHOWN); any other fails its test. Commands
run in this process, those of many ranks in the processes that the other tests of ranks use.
"""

import contextlib
import importlib
import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import bloomlm.export.program
from bloomlm.cli import options, processes
from bloomlm.cli.main import VERBS, main
from tests.distributed.documented import Block, Command, blocks, commands, words_of
from tests.distributed.pool import RankPool

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted({*(ROOT / "docs").glob("*.md")} - {TUTORIAL}),
]

# Beginning of a block or a command -> why it is not run here.
NOT_RUN = {
    "make ": "sets up an environment, then runs the tests or the demo, which tests/unit/test_assets.py runs",
    ".venv/bin/python -m pytest": "runs tests of this suite; tests/unit/test_site.py looks for their files",
    "pip install": "changes the environment",
    "python benchmarks/": "measures for minutes",
    "lm_eval ": "needs the data of lm-eval's tasks from the hub; tests/parity/test_lm_eval.py runs tasks of its own",
    "bloomlm evaluate --model_name_or_path builtin:tiny --tasks": "the same",
    "bloomlm evaluate --model_name_or_path builtin:tiny --eval_path wikitext-2": "the data come from the hub",
    "bloomlm evaluate --model_name_or_path builtin:tiny --eval_path lambada --": "the data come from the hub",
    "bloomlm serve": "serves until a signal ends it; tests/clients/test_docs.py starts it",
    "curl ": "needs a server; tests/clients/test_docs.py runs it",
    "from openai": "the same",
    "from langchain": "the same",
    "vllm ": "needs vLLM",
    "pytest -n 10 tests/gpu": "needs a GPU; its tests are skipped without one",
    "podman ": "needs a container engine; tests/clients/test_docs.py starts the command in Containerfile",
    "[Unit]": "needs systemd; tests/clients/test_docs.py starts the command in it",
    "bloomlm demo": "takes minutes; `make demo` runs it",
    "bloomlm finetune --optim adamw_8bit": "needs bitsandbytes; tests/unit/test_adamw_8bit.py runs it",
    "bloomlm finetune --lora --r 8 --base_quantization nf4": "needs bitsandbytes; tests/unit/test_finetune.py runs it",
    "import optuna": "needs optuna; tests/unit/test_sweep.py runs it",
    "bloomlm finetune --report_to tensorboard,wandb": "needs wandb; tests/unit/test_reporters.py runs it",
    "bloomlm finetune ... --resume_from_checkpoint": "needs a run of PaddleNLP's; tests/unit/test_paddle_finetune.py has one",
    "#!/bin/bash\n#SBATCH": "needs Slurm",
    "apiVersion:": "needs Kubernetes",
    "python run_eval.py --num_processes 2 --model_name_or_path AUTO_DIST_DIR": "needs files of PaddleNLP's auto_dist; "
    "tests/parity/test_paddle_fixtures.py opens them",
}
# Beginnings of blocks that show a file, or what a program prints.
SHOWN = (
    *(
        "{",
        "│",
        "bloomlm/\n",
        "cli > ",
        "  cli > ",
        "source tokens,",
        "pairs.jsonl: ",
        "pairs.jsonl, line ",
        "talks.jsonl, line ",
        "Be brief.",
        "compared with the ",
        "acc 0.500 ",
        "  ok      logits in fp32",
    ),
)
# Programs of PaddleNLP's, shown beside ours under this comment. Where ours is "the same line", it is that line that runs.
THEIRS, THE_SAME = "PaddleNLP", re.compile(r"^bloomlm: .*(same line|lines as they are)")

# Pattern in a command -> what takes its place; `bloomlm plan` needs no files and runs as it stands.
SUBSTITUTIONS = {
    r"bigscience/bloomz?(-\w+)?\b": "builtin:tiny",
    r"builtin:dates(?!-)": "dates",
    r"torchrun --nproc-per-node \d+ -- (\w+\.py)": r"python \1 --num_processes 2",
    r"--num_processes \d+": "--num_processes 2",
    r"--tensor_parallel_degree 2 --sharding stage3": "--sharding stage3",
    r"--tensor_parallel_degree 8 --sharding stage3": "--sharding stage3",
    r"--tensor_parallel_degree \d+": "--tensor_parallel_degree 2",
    r"--nnodes \d": "--nnodes 2",
    r"\$NUMBER_OF_MACHINE": "0",
    r"\$FIRST_MACHINE": "10.0.0.1",
    r" \.\.\.(?= |$)": " --model_name_or_path builtin:tiny --train_file train.jsonl --output_dir runs/more --overwrite_output_dir",
    r"(--src_length 500 .*) --do_train --do_eval": r"\1 --train_file train.jsonl --eval_file dev.jsonl",
    r"\./data/wikitext-103/wiki.valid.tokens": "my.txt",
    r"\./data/(lambada_test.jsonl)": r"\1",
    r"--lora_path (\./checkpoints/bloom-560m|LORA|checkpoints/my-lora|runs/lora|runs/176b)\b": "--lora_path demo",
    r"--lora_path checkpoints/bloom-560m --output_path merged": "--lora_path demo --output_path merged",
    r"--prefix_path \S+": "--prefix_path prefix",
    r"\bBASE\b": "builtin:tiny",
    r"--add_tokens \d+": "--add_tokens 2",
    r"checkpoints/bloom-560m/checkpoint-\d+": "paddle_model",
    r"--input checkpoints/paddle": "--input paddle_model",
    r"^python -m tests\.": f"PYTHONPATH={ROOT} {sys.executable} -m tests.",
}
# Added to each command of a verb: the same work, in small.
SMALLER = {
    "finetune": "--max_steps 2 --save_steps 2 --eval_steps 2 --logging_steps 1 --per_device_train_batch_size 2 "
    "--per_device_eval_batch_size 2 --gradient_accumulation_steps 1 --src_length 24 --tgt_length 8 --report_to none "
    "--device cpu --disable_tqdm",
    "predict": "--max_new_tokens 4 --device cpu",
    "infer": "--max_new_tokens 4",
    "chat": "--max_new_tokens 4 --device cpu",
    "evaluate": "--batch_size 2 --limit 2",
}


def call(*words: str) -> None:
    """Run `bloomlm` with these words in this process.

    Raises:
        AssertionError: it ended with another status than 0.
    """
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 0, f"status {end.code}"


def call_on_rank(directory: str, words: Sequence[str]) -> None:
    os.chdir(directory)
    call(*words)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files that the pages take for granted."""
    directory = tmp_path_factory.mktemp("files")
    (directory / "dates").mkdir()
    rows = "".join(json.dumps({"src": f"{n} and {n} make", "tgt": f" {2 * n}"}) + "\n" for n in range(6))
    for name in ("train", "dev", "test", "dates/train", "dates/dev", "dates/test"):
        (directory / f"{name}.jsonl").write_text(rows)
    (directory / "run.yaml").write_text("model_name_or_path: builtin:tiny\ntrain_file: train.jsonl\noutput_dir: run\n")
    shutil.copyfile(ROOT / "README.md", directory / "README.md")
    (directory / "my.txt").write_text("The cat sat on the mat, and the dog sat beside it. " * 20)
    (directory / "texts.jsonl").write_text("".join(json.dumps({"text": page.read_text()}) + "\n" for page in PAGES[:8]))
    (directory / "lambada_test.jsonl").write_text(json.dumps({"text": "one two three one two three"}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        tiny, small = ("--model_name_or_path", "builtin:tiny"), SMALLER["finetune"].split()
        call("finetune", *tiny, "--train_file", "train.jsonl", "--output_dir", "demo", "--lora", *small)
        call("finetune", *tiny, "--train_file", "train.jsonl", "--output_dir", "prefix", "--prefix", *small)
        call("convert", "--input", "builtin:tiny", "--output", "paddle_model", "--to", "paddle")
        call("convert", "--input", "demo", "--output", "lora_from_2023", "--to", "paddle")
        for name in ("before", "after"):
            words = ("--eval_path", "lambada_test.jsonl", "--output_file", f"{name}.json")
            call("evaluate", *tiny, *words, *SMALLER["evaluate"].split())
        patch.setattr(bloomlm.export.formats.pt2, "find_compiler", lambda: None)  # compiling takes minutes
        call("export", *tiny, "--output_path", "inference/bloom")
    return directory


@pytest.fixture
def reader(files: Path, ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["Reader"]:
    """Who types the commands, in a directory with the files."""
    directory = shutil.copytree(files, tmp_path / "files")
    monkeypatch.chdir(directory)
    monkeypatch.setenv("BLOOMLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.stdin", None)
    monkeypatch.setattr(bloomlm.export.formats.pt2, "find_compiler", lambda: None)

    def start_ranks(flags: processes.ProcessFlags, words: Sequence[str], *, ends_by_signal: bool) -> None:
        alone = ("--num_processes", "1", "--nnodes", "1")
        ranks.run(flags.num_processes, call_on_rank, str(directory), [*words, *alone], joins=False)

    monkeypatch.setattr(options, "start_ranks", start_ranks)
    yield Reader(directory)


class Reader:
    """Runs the blocks of a page one after another."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.done: list[str] = []
        self._theirs: list[str] = []
        self._names: dict[str, object] = {}  # Python blocks of a page go on with each other's names

    def run(self, block: Block) -> None:
        """Run a block, or find out why not."""
        if block.text.startswith((*SHOWN, *NOT_RUN)):
            return
        if block.is_python:
            self.done.append(block.text)
            exec(compile(block.text, "block", "exec"), self._names)
            return
        assert block.is_shell, "neither shell nor Python, and neither in SHOWN nor in NOT_RUN"
        for command in commands(block):
            self._run_command(command)
        self._run_same(block.text)

    def _run_command(self, command: Command) -> None:
        if command.comment.startswith(THEIRS):
            self._theirs.append(command.text)
        else:
            self._call(command.text)

    def _run_same(self, text: str) -> None:
        if any(THE_SAME.match(line.removeprefix("# ")) for line in text.splitlines()):
            for command in self._theirs:
                if "paddle.distributed" not in command:
                    self._call(command)
        self._theirs = []

    def _call(self, text: str) -> None:
        if text.startswith(tuple(NOT_RUN)):
            return
        if not text.startswith("bloomlm plan"):
            for pattern, replacement in SUBSTITUTIONS.items():
                text = re.sub(pattern, replacement, text)
        if text.startswith(tuple(NOT_RUN)):
            return
        self.done.append(text)
        words = words_of(text.splitlines()[0])
        if ">" in words:
            words = words[: words.index(">")]
        if words[0] == "python":
            verb = re.search(r'run_verb\("(\w+)"\)', (ROOT / words[1]).read_text())
            assert verb is not None
            words = ["bloomlm", verb[1], *words[2:]]
        if words[0] != "bloomlm":
            subprocess.run(["bash", "-c", text], check=True)
            return
        assert words[1] in VERBS
        small = SMALLER.get(words[1], "").split() if "--compare" not in words else []
        call(*words[1:], *small)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_page_runs(page: Path, reader: Reader) -> None:
    for block in blocks(page):
        try:
            reader.run(block)
        except Exception as error:
            where = reader.done[-1] if reader.done else block.text
            raise AssertionError(f"{page.name}, block in line {block.line}, at: {where}: {error}") from error


def test_the_tutorial_runs_as_printed(tmp_path: Path) -> None:
    """One shell types all of it, with nothing replaced but the port, which may be taken, and the installation."""
    script = "set -e\n"
    for block in blocks(TUTORIAL):
        if block.is_python:
            script += f"python - <<'BLOCK'\n{block.text}\nBLOCK\n"
        elif block.is_shell and not block.text.startswith("pip install"):
            script += f"{block.text}\n"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    script = script.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    script = script.replace("bloomlm serve", f"bloomlm serve --port {port}")
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **paths, "CXX": "no-compiler", "BLOOMLM_CACHE": str(tmp_path / "cache")}
    run = subprocess.Popen(
        ["bash", "-c", script], cwd=tmp_path, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        printed, errors = run.communicate(timeout=600)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)  # the server, where a block has failed
    assert run.returncode == 0, f"{printed}\n{errors}"
    assert printed.count("\n1989-07-14") == 2, printed  # predict and infer
    assert '"text":"1989-07-14"' in printed  # curl
    assert "\n2024-03-31\n" in printed  # openai
    reports = [json.loads((tmp_path / name).read_text()) for name in ("before.json", "after.json")]
    assert [report["metrics"]["exact_match"]["value"] for report in reports] == pytest.approx([0, 1], abs=0.05)


@pytest.mark.parametrize("verb", VERBS)
def test_every_example_of_the_help_runs(verb: str, reader: Reader) -> None:
    text = inspect.cleandoc(importlib.import_module(VERBS[verb][0]).command.help)
    examples = text.rpartition("\n\n\b\n")[2]
    assert examples.startswith(f"bloomlm {verb}")
    reader.run(Block(1, "sh", examples))


def test_pages_have_commands() -> None:
    found = [command.text for page in PAGES for block in blocks(page) if block.is_shell for command in commands(block)]
    assert len(found) > 60
    assert {words_of(text)[1] for text in found if text.startswith("bloomlm ")} >= VERBS.keys() - {"demo", "infer"}


def test_a_block_that_nobody_can_run_is_refused(reader: Reader) -> None:
    with pytest.raises(AssertionError, match="neither shell nor Python"):
        reader.run(Block(1, "", "bloomlmm finetune"))
    with pytest.raises(AssertionError, match="status 2"):
        reader.run(Block(1, "", "bloomlm finetune --no_such_flag"))
