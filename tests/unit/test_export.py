"""Exported programs: uncompiled here, compiled in test_export_compiled.py; by value against the PyTorch model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bloomlm.export.formats.pt2
import bloomlm.export.graph
import bloomlm.runtime.manifest
from bloomlm.adapters.base import apply_adapter
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.api import LoadedModel, load
from bloomlm.cli import main as cli
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError, ProgramError
from bloomlm.export.formats.pt2 import trace_all
from bloomlm.export.graph import library_product
from bloomlm.export.parity import Parity, compare
from bloomlm.export.program import export_program
from bloomlm.export.weight_formats import Int4, Int8, Plain, format_of, weight_format
from bloomlm.export.weights import weight_entries
from bloomlm.files.atomic import atomic_write
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.runtime import Program
from bloomlm.runtime.formats.pt2 import INSTRUCTION_SETS, instruction_set
from bloomlm.runtime.manifest import Manifest
from tests.edited_manifest import edit, tamper
from tests.process_memory import STATM, resident_bytes
from tests.row_walk import Walk
from tests.tiny_checkpoint import random_model

PROMPTS = ["The history of", "Once upon a time there was a", "1", "def main():"]
OPTIONS = {
    "greedy": {},
    "sampling": {"decode_strategy": "sampling", "top_p": 0.9, "num_return_sequences": 2, "seed": 5},
    "beams": {"decode_strategy": "beam_search", "num_beams": 3},
    "stop": {"stop": ["\n"], "repetition_penalty": 1.3},
}

pytestmark = pytest.mark.usefixtures("no_compiler")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load("builtin:tiny", dtype="float32")


@pytest.fixture(scope="module")
def exported(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inference") / "bloom"
    result = export_program(loaded.model, loaded.tokenizer, path, source="builtin:tiny", max_new_tokens=7)
    assert result.parity is not None and not result.is_compiled
    return path


@pytest.fixture(scope="module")
def program(exported: Path) -> Program:
    return Program(exported)


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported.parent, tmp_path / "copy")
    return tmp_path / "copy" / exported.name


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_program_writes_what_the_model_writes(loaded: LoadedModel, program: Program, options: dict) -> None:
    expected = loaded.generate(PROMPTS, max_new_tokens=24, **options)
    assert program.generate(PROMPTS, max_new_tokens=24, **options) == expected
    assert program.generate(PROMPTS, max_new_tokens=24, batch_size=1, **options) == expected


@pytest.mark.skipif(not STATM.exists(), reason="counts memory as Linux does")
@torch.inference_mode()
def test_only_rows_in_use_take_memory(program: Program) -> None:
    slot_bytes = sum(part.nbytes for part in program.model.open_rows(1, 1).cache)
    before = resident_bytes()
    rows = program.model.open_rows(64, 4 * 2**20 // slot_bytes)
    assert sum(part.nbytes for part in rows.cache) > 250 * 2**20
    rows.prefill([3, 50], [[5, 6], [7]])
    rows.decode_step([50, 3], torch.tensor([8, 9]))
    assert resident_bytes() - before < 50 * 2**20
    assert program.model.bytes_per_token == slot_bytes


@pytest.mark.parametrize("seed", range(2))
def test_a_random_walk_gives_the_logits_of_whole_texts(loaded: LoadedModel, program: Program, seed: int) -> None:
    walk = Walk(loaded.model, program.model, seed)
    walk.run(60)
    assert walk.num_checked > 50


def test_a_program_has_one_adapter(program: Program) -> None:
    rows = program.model.open_rows(1, 2)
    rows.set_adapter(0, None)
    with pytest.raises(ProgramError, match="in the format pt2 cannot choose the adapter french"):
        rows.set_adapter(0, "french")


def test_program_knows_its_defaults(program: Program, exported: Path) -> None:
    (completion,) = program.generate("The history of")
    assert len(completion.tokens) == 7
    manifest = Manifest.read(exported.with_suffix(".json"))
    assert manifest.parity["num_positions"] == 288
    assert manifest.special_tokens == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}


def small_model(vocab_size: int, hidden_size: int = 32, n_head: int = 4, **changes: bool) -> BloomForCausalLM:
    return random_model(
        BloomConfig(vocab_size=vocab_size, hidden_size=hidden_size, n_layer=2, n_head=n_head, **changes)
    )


def export_small(loaded: LoadedModel, path: Path, **options: Any) -> None:
    """A program of one small block, for what does not depend on the model."""
    model = random_model(BloomConfig(vocab_size=loaded.tokenizer.vocab_size, hidden_size=16, n_layer=1, n_head=2))
    export_program(model, loaded.tokenizer, path, source="small", **options)


def logits_error(model: BloomForCausalLM, path: Path) -> float:
    """Over prompts of unequal length and forced tokens."""
    ids = torch.randint(4, model.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(1))
    prompts = [[5], [6, 7, 8, 9], [10, 11]]
    return compare(model, Program(path).model, prompts, ids).logits_error


@pytest.mark.parametrize(
    "adapter", [LoraConfig(r=2, target_modules=("query_key_value", "dense")), PrefixConfig(num_prefix_tokens=3)]
)
def test_adapters_are_folded_in(loaded: LoadedModel, tmp_path: Path, adapter: LoraConfig | PrefixConfig) -> None:
    model = small_model(vocab_size=loaded.tokenizer.vocab_size)
    apply_adapter(model, adapter, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "prefix" in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    path = tmp_path / "bloom"
    export_program(model, loaded.tokenizer, path, source="small", verify=False)
    assert logits_error(model, path) < 1e-5
    Walk(model, Program(path).model, tolerance=5e-5).run(40)  # a merged weight is rounded
    without = small_model(vocab_size=loaded.tokenizer.vocab_size)
    assert logits_error(without, path) > 1e-2


def test_residual_after_the_norm_and_odd_heads(loaded: LoadedModel, tmp_path: Path) -> None:
    model = small_model(
        vocab_size=loaded.tokenizer.vocab_size, n_head=3, hidden_size=48, apply_residual_connection_post_layernorm=True
    )
    export_program(model, loaded.tokenizer, tmp_path / "bloom", source="small", verify=False)
    assert logits_error(model, tmp_path / "bloom") < 1e-5


@pytest.mark.parametrize(("quantization", "limit"), [("int8", 0.01), ("int4", 0.05)])
def test_quantised_programs_keep_their_bounds(
    loaded: LoadedModel, tmp_path: Path, quantization: str, limit: float
) -> None:
    path = tmp_path / "bloom"
    result = export_program(loaded.model, loaded.tokenizer, path, source="tiny", quantization=quantization)
    assert result.parity is not None
    assert result.parity.logits_error > 0 and result.parity.perplexity_change < limit
    bits = {"int8": 9.5, "int4": 5.0}[quantization]
    assert result.files["bloom.safetensors"] < loaded.model.config.num_parameters * bits / 8


def test_a_program_that_differs_is_not_written(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        bloomlm.export.formats.pt2, "library_product", lambda *given, **named: 1.01 * library_product(*given, **named)
    )
    with pytest.raises(ProgramError, match="differs from the model: logits error"):
        export_small(loaded, tmp_path / "bloom")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weights", [Plain(torch.float32), Plain(torch.bfloat16), Int8(), Int4()], ids=str)
@pytest.mark.parametrize("num_out", [40, 3])
def test_products_are_those_of_the_decoded_matrix(
    monkeypatch: pytest.MonkeyPatch, weights: Plain | Int8 | Int4, num_out: int
) -> None:
    monkeypatch.setattr(bloomlm.export.graph, "_BLOCK_ELEMENTS", 16 * 96)  # 40 rows are three blocks
    random = torch.Generator().manual_seed(0)
    matrix = torch.randn(num_out, 96, generator=random)
    x = torch.randn(5, 96, generator=random)
    parts = weights.encode(matrix, "w")
    for key, entry in weights.entries(num_out, 96).items():
        assert (tuple(parts[key].shape), parts[key].dtype) == (entry.shape, entry.dtype)
    assert format_of(parts["weight"].dtype) == weights
    expected = x.double() @ weights.decode(parts).double().t()
    torch.testing.assert_close(library_product(x, parts).double(), expected, rtol=1e-5, atol=1e-5)
    error = (weights.decode(parts) - matrix).norm() / matrix.norm()
    assert error <= {"weight": 0.003}.get("".join(parts), 0.012 if isinstance(weights, Int8) else 0.12)


@pytest.mark.parametrize(
    ("for_compiler", "options", "expected"),
    [(False, {}, {"linear"}), (True, {}, {"product"}), (True, None, {"linear"})],
)
def test_who_multiplies(
    monkeypatch: pytest.MonkeyPatch, for_compiler: bool, options: dict[str, object] | None, expected: set[str]
) -> None:
    """Uncompiled functions need no operator that a PyTorch may lack."""
    monkeypatch.setattr(bloomlm.export.formats.pt2, "compiler_options", lambda: options)
    config, weights = BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2), Plain(torch.float32)
    entries = weight_entries(config, weights, num_virtual=0)
    tensors = {name: torch.zeros(entry.shape, dtype=entry.dtype) for name, entry in entries.items()}
    operators = {"aten.linear.default": "linear", "bloomlm.product.default": "product"}
    for program in trace_all(config, weights, tensors, for_compiler=for_compiler).values():
        assert {operators.get(str(node.target)) for node in program.graph.nodes} - {None} == expected


def test_int4_places_zeros_and_extremes() -> None:
    matrix = torch.zeros(3, 64)
    matrix[1, 5], matrix[2, 40] = 7.0, -7.0
    torch.testing.assert_close(Int4().decode(Int4().encode(matrix, "w")), matrix)


def test_int4_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ConfigError, match="groups of 32"):
        weight_format("int4", torch.float32).entries(4, 48)
    with pytest.raises(Exception, match="w holds NaN"):
        Int4().encode(torch.full((2, 32), float("nan")), "w")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.with_suffix(".safetensors").write_bytes(b"x" * 100), "holds 100 bytes"),
        (lambda p: p.with_suffix(".safetensors").unlink(), "cannot be read"),
        (lambda p: p.with_suffix(".json").unlink(), "holds no exported program"),
        (lambda p: p.with_suffix(".json").write_text("{"), "no JSON"),
        (lambda p: p.with_suffix(".json").write_text("{}"), "does not describe an exported program"),
        (lambda p: edit(p, version=99), "version 99"),
        (lambda p: edit(p, version=5), "is of version 5, this bloomlm runs version 6; export the program again"),
        (lambda p: edit(p, format="tflite"), "damaged: format 'tflite'"),
        (lambda p: edit(p, unknown=1), "unexpected keyword argument 'unknown'"),
        (lambda p: tamper(p, n_head=5), "damaged or was edited"),
        (lambda p: flip(Path(f"{p}.decode_step.graph.pt2")), "checksum"),
        (lambda p: flip(p.with_suffix(".safetensors"), 9), "checksum"),
        (lambda p: (p.parent / "tokenizer.json").write_text("{}"), "tokenizer"),
        (lambda p: rewrite(p.parent / "tokenizer.json"), "another tokenizer"),
    ],
)
def test_damage_is_told(copied: Path, damage: object, message: str) -> None:
    damage(copied)
    with pytest.raises(Exception, match=message) as caught:
        Program(copied)
    assert type(caught.value).__module__ == "bloomlm.errors"


def rewrite(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))


def flip(path: Path, place: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)


def test_checksums_of_weights_are_compared_when_asked(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = copied.with_suffix(".safetensors")
    monkeypatch.setattr(bloomlm.runtime.manifest, "_HEAD_BYTES", 1000)  # as of a large file
    files = Manifest.read(copied.with_suffix(".json")).files
    edit(copied, files={**files, weights.name: bloomlm.runtime.manifest.describe_file(weights)})
    flip(weights)
    Program(copied)
    with pytest.raises(ProgramError, match="checksum"):
        Program(copied, verify_weights=True)


def test_foreign_weights_of_the_right_size_are_refused(copied: Path) -> None:
    manifest = json.loads(copied.with_suffix(".json").read_text())
    manifest["weights"]["dense.bias"][1] = [4, 64]
    edit(copied, weights=manifest["weights"])
    with pytest.raises(ProgramError, match=r"dense\.bias is"):
        Program(copied)


def test_a_directory_has_one_tokenizer(loaded: LoadedModel, copied: Path) -> None:
    rewrite(copied.parent / "tokenizer.json")
    other = Tokenizer.from_directory(copied.parent)
    with pytest.raises(ProgramError, match="holds the program bloom, whose tokenizer is another one"):
        export_program(loaded.model, other, copied.with_name("second"), source="tiny")
    assert not list(copied.parent.glob("*second*"))
    export_small(loaded, copied.with_name("second"), verify=False)
    assert Program(copied.with_name("second")).generate("The") and Program(copied).generate("The")


def test_backends_that_do_not_fit_are_refused(exported: Path) -> None:
    with pytest.raises(ProgramError, match="format pt2, which backend openvino does not run"):
        Program(exported, backend="openvino")


def test_instruction_sets() -> None:
    assert instruction_set(INSTRUCTION_SETS["x86-64-v3"]) == "x86-64-v3"
    assert instruction_set(frozenset({"avx"})) == "x86-64"


def test_the_runtime_needs_no_model_code(loaded: LoadedModel, exported: Path, tmp_path: Path) -> None:
    """`bloomlm infer` in a process where those modules cannot be imported."""
    code = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if any(name == b or name.startswith(b + ".") for b in BLOCKED):
            raise ImportError(f"{name} is blocked")

BLOCKED = ("bloomlm.model", "bloomlm.checkpoint", "bloomlm.adapters", "bloomlm.api", "transformers", "peft")
sys.meta_path.insert(0, Blocked())
from bloomlm.cli.main import main
main(sys.argv[1:])
"""
    flags = ["--model_dir", str(exported.parent), "--model_prefix", exported.name, "--prompt", PROMPTS[0]]
    output = tmp_path / "answers.jsonl"
    (expected,) = loaded.generate(PROMPTS[0], max_new_tokens=7)
    for more, shown in (([], f"{PROMPTS[0]}\n{expected.completion}\n"), (["--output_file", str(output)], "")):
        words = [sys.executable, "-c", code, "infer", *flags, *more]
        result = subprocess.run(words, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stdout == shown
    assert json.loads(output.read_text())["completion"] == expected.completion


def test_the_runtime_loads_only_what_it_uses() -> None:
    code = """
import sys
import bloomlm.runtime
foreign = {"llama_cpp", "onnxruntime", "openvino", "onnx", "gguf", "huggingface_hub", "click", "rich", "yaml"}
ours = {f"bloomlm.{name}" for name in ("model", "checkpoint", "adapters", "parallel", "export", "cli", "api")}
compilers = {"torch._dynamo", "torch._inductor", "torch.onnx"}
sys.exit(", ".join(sorted((foreign | ours | compilers) & set(sys.modules))) or 0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(list(map(str, arguments)))
    return int(exit_info.value.code or 0)


def test_the_commands(loaded: LoadedModel, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = copied.with_suffix(".txt")
    notes.write_text("somebody's notes")
    flags = ["--model_name_or_path", "builtin:tiny", "--output_path", copied, "--dtype", "float32"]
    assert run("export", *flags, "--max_length", 6) == 0  # over the older one
    printed = capsys.readouterr().out
    assert "of the likeliest tokens equal" in printed and "relative error" in printed
    assert notes.read_text() == "somebody's notes"
    infer = ["infer", "--model_dir", copied.parent, "--model_prefix", copied.name, "--prompt", PROMPTS[0]]
    (expected,) = loaded.generate(PROMPTS[0], max_new_tokens=6)
    assert run(*infer) == 0
    assert capsys.readouterr().out == f"{PROMPTS[0]}\n{expected.completion}\n"
    assert run(*infer, "--stream", "--stop", expected.completion[3:5], "--cpu_threads", 1) == 0
    assert capsys.readouterr().out == f"{PROMPTS[0]}\n{expected.completion[:3]}\n"
    assert run(*infer, "--max_length", 0) == 2
    assert "max_new_tokens is 0" in capsys.readouterr().err
    assert run(*infer, "--device", "gpu") == 2
    assert "use bloomlm predict on a GPU" in capsys.readouterr().err
    assert run("export", *flags, "--quantization", "int8") == 2
    assert "--dtype has no effect with --quantization int8" in capsys.readouterr().err


def test_limits_of_parity() -> None:
    values = {"num_positions": 1, "logits_error": 1e-6, "largest_difference": 0.0, "equal_tokens": 1.0}
    good = Parity(**values, clear_tokens_differ=0, model_perplexity=10.0, program_perplexity=10.2)
    good.check("float32")
    good.check("int4")
    with pytest.raises(ProgramError, match=r"perplexity change is 0\.02"):
        good.check("int8")
    with pytest.raises(ProgramError, match="nan"):
        Parity(
            **values | {"logits_error": float("nan")}, clear_tokens_differ=0, model_perplexity=1, program_perplexity=1
        ).check("float32")
    with pytest.raises(ProgramError, match="other tokens at 2 positions"):
        Parity(**values, clear_tokens_differ=2, model_perplexity=1, program_perplexity=1).check("float32")


def test_others_may_write_beside_an_export(loaded: LoadedModel, tmp_path: Path) -> None:
    """Writers remove what killed ones left behind; an export that is still going on is no such thing."""

    def write(stage: str, share: float) -> None:
        atomic_write(tmp_path / "notes.txt", stage)

    export_small(loaded, tmp_path / "bloom", verify=False, on_stage=write)
    Program(tmp_path / "bloom")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_flags_offer_what_the_tables_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", "--model_name_or_path", "builtin:tiny", "--format", "tflite") == 2
    assert "'pt2', 'onnx', 'openvino', 'gguf'" in capsys.readouterr().err
    assert run("infer", "--model_dir", "nowhere", "--backend", "tflite") == 2
    assert "'auto', 'pt2', 'onnx_runtime', 'openvino', 'llama_cpp'" in capsys.readouterr().err
