"""The benchmark and the soak test of the server run, in small."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *flags: str) -> str:
    result = subprocess.run(
        [sys.executable, script, *flags], cwd=BENCHMARKS, capture_output=True, text=True, check=False
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
