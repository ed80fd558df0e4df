"""The compiled package: small programs, compiled once for all tests of this file."""

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bloomlm.api import load
from bloomlm.errors import ProgramError
from bloomlm.export.parity import compare
from bloomlm.export.program import export_program
from bloomlm.model.config import BloomConfig
from bloomlm.runtime import Program
from bloomlm.runtime.formats.pt2 import Pt2Model
from bloomlm.runtime.torch_internals import find_compiler
from tests.edited_manifest import edit
from tests.row_walk import Walk
from tests.tiny_checkpoint import random_model

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")

CONFIG = BloomConfig(vocab_size=2048, hidden_size=128, n_layer=1, n_head=2)
PROMPTS = [[5], list(range(6, 40)), [10, 11], [12] * 9, [13, 14, 15], list(range(50, 67)), [16], [17, 18]]
"""Of unequal length, one with more slots than the widest vector has numbers."""
LIMITS = {"float32": (0.0, 1e-5), "bfloat16": (1e-4, 0.04), "int8": (1e-4, 0.1)}
"""By the matrices' precision: error of the logits against the model, at least and at most."""
COMPILED_LIMITS = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 1e-2}
"""Of the compiled program against the uncompiled one; beside matrices of fewer bits it rounds activations, to bfloat16 at
the coarsest."""


@pytest.fixture(scope="module", params=LIMITS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "bloom"
    tokenizer = load("builtin:tiny").tokenizer
    shares: list[float] = []
    result = export_program(
        random_model(CONFIG),
        tokenizer,
        path,
        source="small",
        quantization="int8" if request.param == "int8" else "none",
        dtype=torch.bfloat16 if request.param == "bfloat16" else None,
        verify=False,
        on_stage=lambda stage, share: shares.append(share) if stage == "compiling" else None,
    )
    assert result.is_compiled and shares == pytest.approx([0, 1 / 2, 1])
    return path


def precision(program: Program) -> str:
    """The key of LIMITS."""
    return program.manifest.dtype if program.manifest.quantization == "none" else program.manifest.quantization


def uncompiled(path: Path) -> Pt2Model:
    program = Program(path)
    return Pt2Model(dataclasses.replace(program.manifest, instruction_set=None), path.parent, path.name)


@pytest.mark.parametrize("rows", [range(8), range(4), [0, 1, 2], [2, 0], [1]], ids=len)
def test_compiled_equals_uncompiled_and_the_model(exported: Path, rows: Sequence[int]) -> None:
    program = Program(exported)
    assert program.model.is_compiled
    forced = torch.randint(4, CONFIG.vocab_size, (len(rows), 7), generator=torch.Generator().manual_seed(1))
    prompts = [PROMPTS[row] for row in rows]
    between = compare(uncompiled(exported), program.model, prompts, forced)
    assert between.logits_error < COMPILED_LIMITS[precision(program)]
    model = random_model(CONFIG)
    least, most = LIMITS[precision(program)]
    assert least <= compare(model, program.model, prompts, forced).logits_error < most


def test_a_random_walk_gives_the_logits_of_whole_texts(exported: Path) -> None:
    program = Program(exported)
    oracle = random_model(CONFIG)
    tolerance = LIMITS[precision(program)][1]
    walk = Walk(oracle, program.model, tolerance=tolerance)
    walk.run(100)
    assert walk.num_checked > 100


def test_the_runtime_needs_no_compiler(exported: Path) -> None:
    code = """
import sys
from bloomlm.runtime import Program
program = Program(sys.argv[1])
print([completion.tokens for completion in program.generate(["The", "A", "1", "def main():"], max_new_tokens=5)])
sys.exit(", ".join({"torch._inductor", "torch._dynamo", "bloomlm.model"} & set(sys.modules)) or 0)
"""
    result = subprocess.run([sys.executable, "-c", code, exported], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    expected = Program(exported).generate(["The", "A", "1", "def main():"], max_new_tokens=5)
    assert result.stdout == f"{[completion.tokens for completion in expected]}\n"


@pytest.mark.parametrize("num_rows", [3, 8])
def test_the_cache_is_written_in_place(exported: Path, num_rows: int) -> None:
    program = Program(exported)
    rows = program.model.open_rows(num_rows + 2, 40)
    chosen = range(1, num_rows + 1)
    assert {part.dtype for part in rows.cache} == {
        torch.bfloat16 if precision(program) == "bfloat16" else torch.float32
    }
    for part in rows.cache:
        part[[0, -1]] = 0.0  # rows that are not used
    rows.prefill(chosen, PROMPTS[:num_rows])
    before = [(part.data_ptr(), part.clone()) for part in rows.cache]
    rows.decode_step(chosen, torch.arange(7, 7 + num_rows))
    for part, (address, old) in zip(rows.cache, before, strict=True):
        assert part.data_ptr() == address
        for row, prompt in zip(chosen, PROMPTS, strict=False):
            slot = len(prompt)
            assert torch.equal(part[row, :, :slot], old[row, :, :slot])
            assert part[row, :, slot].abs().min() > 0 and not part[row, :, slot + 1 :].any()
        assert not part[[0, -1]].any()


def test_batches_equal_single_prompts(exported: Path) -> None:
    program = Program(exported)
    texts = ["The", "Once upon a time there was a house", "def main():"]
    together = program.generate(texts, max_new_tokens=12)
    assert together == [program.generate(text, max_new_tokens=12)[0] for text in texts]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"instruction_set": "x86-64-v9"}, "compiled for x86-64-v9"),
        ({"library_versions": {"torch": "1.0"}}, "PyTorch 1.0"),
    ],
)
def test_what_does_not_fit_the_machine_runs_uncompiled(
    exported: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict, reason: str
) -> None:
    path = shutil.copytree(exported.parent, tmp_path / "copy") / exported.name
    edit(path, **changes)
    program = Program(path)
    assert not program.model.is_compiled and reason in caplog.text
    assert program.generate("The", max_new_tokens=8) == Program(exported).generate("The", max_new_tokens=8)


def test_a_damaged_package_is_told(exported: Path, tmp_path: Path) -> None:
    path = shutil.copytree(exported.parent, tmp_path / "copy") / exported.name
    package = path.with_suffix(".pt2")
    content = bytearray(package.read_bytes())
    content[len(content) // 2] ^= 1
    package.write_bytes(content)
    with pytest.raises(ProgramError, match="checksum"):
        Program(path)
