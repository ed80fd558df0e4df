"""The compiled package: one small program, compiled once for all tests of this file."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from bloomlm.api import load
from bloomlm.errors import ProgramError
from bloomlm.export.compile import find_compiler
from bloomlm.export.parity import compare
from bloomlm.export.program import export_program
from bloomlm.generation.decode import BloomLanguageModel
from bloomlm.model.config import BloomConfig
from bloomlm.runtime import Program
from bloomlm.runtime.pt2 import Pt2Model
from tests.edited_manifest import edit
from tests.tiny_checkpoint import random_model

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")

CONFIG = BloomConfig(vocab_size=2048, hidden_size=32, n_layer=1, n_head=2)
PROMPTS = [[5], list(range(6, 40)), [10, 11]]  # more slots than the widest vector has numbers


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "bloom"
    tokenizer = load("builtin:tiny").tokenizer
    result = export_program(random_model(CONFIG), tokenizer, path, source="small", quantization="int8", verify=False)
    assert result.is_compiled
    return path


def uncompiled(path: Path) -> Pt2Model:
    program = Program(path)
    return Pt2Model(dataclasses.replace(program.manifest, instruction_set=None), path.parent, path.name)


def test_compiled_equals_uncompiled(exported: Path) -> None:
    program = Program(exported)
    assert program.model.is_compiled
    forced = torch.randint(4, CONFIG.vocab_size, (3, 7), generator=torch.Generator().manual_seed(1))
    for rows in ([0, 1, 2], [1], [2, 0]):  # a strided column of ids each step, as the comparison cuts it
        prompts = [PROMPTS[row] for row in rows]
        found = compare(uncompiled(exported), program.model, prompts, forced[rows])
        assert found.logits_error < 1e-5
        model = BloomLanguageModel(random_model(CONFIG))
        assert 1e-4 < compare(model, program.model, prompts, forced[rows]).logits_error < 0.05  # int8's own


def test_the_cache_is_written_in_place(exported: Path) -> None:
    program = Program(exported)
    batch, _ = program.model.prefill(PROMPTS, 4)
    before = [(part.data_ptr(), part.clone()) for part in batch.cache]
    batch.decode_step(torch.tensor([7, 8, 9]))
    for part, (address, old) in zip(batch.cache, before, strict=True):
        assert part.data_ptr() == address
        slot = batch.num_slots - 1
        assert torch.equal(part[:, :, :slot], old[:, :, :slot])
        assert part[:, :, slot].abs().min() > 0 and not part[:, :, slot + 1 :].any()


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
