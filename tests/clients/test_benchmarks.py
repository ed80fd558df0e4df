"""The benchmarks run, in small: what needs no other program, and the server with its soak test."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bloomlm.checkpoint.writer import write_model
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import PUBLISHED_SIZES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = replace(PUBLISHED_SIZES["560m"], n_layer=2, hidden_size=64, n_head=2)
ONE = "--size small --rounds 1"
CASES = {
    f"train_step.py --tuning full --steps 1 {ONE}": ("transformers", "bloomlm"),
    f"decode.py --new_tokens 2 --repeats 1 {ONE}": ("transformers", "bloomlm"),
    f"load.py {ONE}": ("transformers", "bloomlm"),
    f"generate.py --sides eager --new_tokens 2 {ONE}": ("eager",),
    f"trim.py --runtimes train --vocabularies 2048 --steps 1 {ONE}": ("train@2048",),
    f"evaluate.py --task sliding --limit 2 --file text.tokens {ONE}": ("naive", "bloomlm"),
    "kernels.py --megabytes 1 --rows 1 --widths 1024 --formats int8": ("int8, 1024 wide, 1 rows",),
}
"""Command -> the rows that it records."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models under the names by which random_model finds them, with BLOOM's vocabulary and with less, and a text."""
    root = tmp_path_factory.mktemp("benchmarks")
    for name, vocab_size in (("small", SMALL.vocab_size), ("small-vocab_size2048", 2048)):
        model = BloomForCausalLM(replace(SMALL, vocab_size=vocab_size))
        model.init_weights(torch.Generator().manual_seed(0))
        path = root / f"bloom-{name}-random"
        path.mkdir()
        write_model(path, model.config, model.state_dict().items(), dtype=torch.float32)
    (root / "text.tokens").write_text("The cat sat on the mat. " * 100)
    return root


@pytest.mark.parametrize(("command", "rows"), CASES.items())
def test_a_script_records_its_rows(command: str, rows: tuple[str, ...], directory: Path) -> None:
    words = [str(directory / word) if word.endswith(".tokens") else word for word in command.split()]
    path = directory / "rows.json"
    run(*words, BLOOMLM_BENCH_DIR=str(directory), BLOOMLM_BENCH_ROWS=str(path))
    found = json.loads(path.read_text())
    assert tuple(found) == rows
    assert all(len(rounds) == 1 and rounds[0] for rounds in found.values())


def run(script: str, *flags: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, script, *flags],
        cwd=BENCHMARKS,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_benchmark() -> None:
    parts = ("rates", "http_overhead", "long_prompt")
    output = run("serve.py", "--quick", "--threads", "1", "--parts", ",".join(parts))
    assert [part for part in parts if f"| {part} |" in output] == list(parts)
    assert "| eager, 4 streams |" in output


def test_soak() -> None:
    output = run("soak.py", "--minutes", "0.2", "--threads", "1")
    assert output.endswith("\n0 violations\n")
    assert "killed process" in output
