"""GGUF files in llama.cpp's own runtime, by value against the PyTorch model."""

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from bloomlm.adapters.base import apply_adapter
from bloomlm.adapters.lora import LoraConfig
from bloomlm.api import LoadedModel, load
from bloomlm.cli import main as cli
from bloomlm.errors import BackendMissingError, CheckpointError, GenerationError, ProgramError
from bloomlm.export.formats.gguf import _q4_0
from bloomlm.export.parity import LIMITS, compare
from bloomlm.export.program import export_program
from bloomlm.runtime import Program
from bloomlm.runtime.manifest import describe_file
from tests.edited_manifest import edit
from tests.row_walk import Walk

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

PROMPTS = ["The history of", "Once upon a time, in 1969, there was a", "1", "def main():"]
OPTIONS = {
    "greedy": {},
    "sampling": {"decode_strategy": "sampling", "top_p": 0.9, "num_return_sequences": 3, "seed": 5},
    "beams": {"decode_strategy": "beam_search", "num_beams": 3},
    "stop": {"stop": ["\n"], "repetition_penalty": 1.3},
}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """The built-in model with a LoRA that changes what it says."""
    loaded = load("builtin:tiny", dtype="float32")
    apply_adapter(loaded.model, LoraConfig(r=2), torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    return loaded


@pytest.fixture(scope="module")
def exported(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("llama_cpp", reason="the extra llama_cpp is not installed")
    path = tmp_path_factory.mktemp("gguf") / "bloom"
    result = export_program(loaded.model, loaded.tokenizer, path, source="tiny", format="gguf", max_new_tokens=9)
    assert result.parity is not None and result.not_compared is None
    assert 0 < result.parity.logits_error < LIMITS["llama.cpp"]["logits_error"]
    assert result.parity.equal_tokens == 1.0
    return path


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_llama_cpp_writes_what_the_model_writes(loaded: LoadedModel, exported: Path, options: dict) -> None:
    program = Program(exported)
    expected = loaded.generate(PROMPTS, max_new_tokens=16, **options)
    assert program.generate(PROMPTS, max_new_tokens=16, **options) == expected
    assert program.generate(PROMPTS, max_new_tokens=16, batch_size=1, **options) == expected


def test_a_random_walk_gives_the_logits_of_whole_texts(loaded: LoadedModel, exported: Path) -> None:
    program = Program(exported)
    walk = Walk(loaded.model, program.model, tolerance=LIMITS["llama.cpp"]["logits_error"])
    walk.run(60)
    assert walk.num_checked > 50
    with pytest.raises(ProgramError, match="in the format gguf cannot give out keys and values"):
        walk.rows.read_block(0, 0, 1)


def test_prompts_longer_than_what_is_read_at_once(loaded: LoadedModel, exported: Path) -> None:
    random = torch.Generator().manual_seed(3)
    prompts = [torch.randint(4, 2000, (length,), generator=random).tolist() for length in (600, 7, 520)]
    forced = torch.randint(4, 2000, (3, 2), generator=random)
    found = compare(loaded.model, Program(exported).model, prompts, forced)
    assert found.logits_error < LIMITS["llama.cpp"]["logits_error"]


@pytest.mark.parametrize(("quantization", "limit"), [("int8", 0.01), ("int4", 0.05)])
def test_quantised_files_keep_their_bounds(
    loaded: LoadedModel, tmp_path: Path, quantization: str, limit: float
) -> None:
    pytest.importorskip("llama_cpp", reason="the extra llama_cpp is not installed")
    path = tmp_path / "bloom"
    result = export_program(
        loaded.model, loaded.tokenizer, path, source="tiny", format="gguf", quantization=quantization
    )
    assert result.parity is not None and 1e-3 < result.parity.logits_error < 0.3
    assert result.parity.perplexity_change < limit


def test_q4_0_is_read_as_it_was_meant() -> None:
    matrix = torch.randn(300, 96, generator=torch.Generator().manual_seed(2))
    matrix[7, 32:64] = 0.0
    kind = gguf.GGMLQuantizationType.Q4_0
    errors = []
    for content in (_q4_0("w", matrix), gguf.quantize(matrix.numpy(), kind)):
        decoded = torch.from_numpy(gguf.dequantize(content, kind))
        assert not decoded[7, 32:64].any()
        errors.append(float((decoded - matrix).norm() / matrix.norm()))
    assert errors[0] < 0.97 * errors[1] < 0.1
    with pytest.raises(CheckpointError, match="w holds NaN"):
        _q4_0("w", matrix / 0)


def test_its_tokenizer_is_ours(loaded: LoadedModel, exported: Path) -> None:
    model = Program(exported).model
    vocab = model.library.llama_model_get_vocab(model.handle)
    for text in ["Once upon a time, in 1969", " d'eau, naïve", "春天到了  x\n\n\tdef", "</s>"]:
        content = text.encode()
        found = (ctypes.c_int32 * 100)()
        count = model.library.llama_tokenize(vocab, content, len(content), found, 100, False, True)
        assert found[:count] == loaded.tokenizer.encode(text)


def test_the_command_takes_the_format_s_own_backend(
    loaded: LoadedModel, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (expected,) = loaded.generate(PROMPTS[0], max_new_tokens=9)
    flags = ["infer", "--model_dir", str(exported.parent), "--prompt", PROMPTS[0]]
    for backend in ([], ["--backend", "auto"], ["--backend", "llama_cpp"]):
        with pytest.raises(SystemExit) as exit_info:
            cli.main([*flags, *backend])
        assert exit_info.value.code == 0
        assert capsys.readouterr().out == f"{PROMPTS[0]}\n{expected.completion}\n"
    with pytest.raises(ProgramError, match="format gguf, which backend pt2 does not run"):
        Program(exported, backend="pt2")


def test_a_batch_is_as_large_as_llama_cpp_takes(exported: Path) -> None:
    model = Program(exported).model
    most = model.library.llama_max_parallel_sequences()
    with pytest.raises(GenerationError, match=f"at most {most} texts at once, and this batch has {most + 1}"):
        model.open_rows(most + 1, 2)


@pytest.mark.parametrize("place", [0, 4, 30, 5000])
def test_damage_is_told(exported: Path, tmp_path: Path, place: int) -> None:
    path = copied(exported, tmp_path)
    content = bytearray(path.with_suffix(".gguf").read_bytes())
    content[place] ^= 255
    path.with_suffix(".gguf").write_bytes(content)
    with pytest.raises(ProgramError, match="checksum"):
        Program(path)


@pytest.mark.parametrize("content", [b"", b"x" * 1000, "half"])
def test_what_llama_cpp_cannot_load_is_told(exported: Path, tmp_path: Path, content: bytes | str) -> None:
    path = copied(exported, tmp_path)
    file = path.with_suffix(".gguf")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    edit(path, files={file.name: describe_file(file)})
    with pytest.raises(ProgramError, match=r"cannot be loaded by llama\.cpp: .*[a-z]{4}"):
        Program(path)


def copied(exported: Path, tmp_path: Path) -> Path:
    for file in exported.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / exported.name


def test_without_llama_cpp(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    flags = ["--model_name_or_path", "builtin:tiny", "--output_path", str(tmp_path / "bloom"), "--format", "gguf"]
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["export", *flags])
    assert exit_info.value.code == 0
    printed = capsys.readouterr().out
    assert "not compared with the model: backend llama_cpp needs llama-cpp-python" in printed
    with pytest.raises(BackendMissingError, match=r"pip install 'bloomlm\[llama_cpp\]'"):
        Program(tmp_path / "bloom")
