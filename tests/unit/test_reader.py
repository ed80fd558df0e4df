"""Reading Hugging Face checkpoints: every layout, every kind of damage, and how much memory it takes."""

import dataclasses
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bloomlm.adapters.base import Adapter, apply_adapter
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint.reader import load_model, open_reader, read_config
from bloomlm.checkpoint.safetensors_file import SafetensorsFile
from bloomlm.checkpoint.writer import write_model
from bloomlm.errors import CheckpointError, ConfigError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.documents import Documents
from tests.tiny_checkpoint import TINY, assert_equal_models, random_model, write_random_model

LN_F = "transformer.ln_f.weight"
EMBEDDING = "transformer.word_embeddings.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_random_model(tmp_path / "model")
    return tmp_path / "model"


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(checkpoint / "model.safetensors").items()}


def rewrite(checkpoint: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, checkpoint / "model.safetensors", {"format": "pt"})


def write_bin(checkpoint: Path, state: dict[str, torch.Tensor], **options: bool) -> None:
    (checkpoint / "model.safetensors").unlink()
    torch.save(state, checkpoint / "pytorch_model.bin", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard_size_bytes", [10**9, 40_000])
def test_what_was_written_is_read_in_its_own_precision(
    tmp_path: Path, dtype: torch.dtype, shard_size_bytes: int
) -> None:
    written = write_random_model(tmp_path, dtype=dtype, max_shard_size_bytes=shard_size_bytes)
    model = load_model(tmp_path)
    assert_equal_models(model, written)
    assert not model.training
    assert model.config.dtype == model.transformer.config.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("memory_map", [True, False])
def test_requested_precision(tmp_path: Path, memory_map: bool) -> None:
    write_random_model(tmp_path, dtype=torch.float32)
    model = load_model(tmp_path, dtype=torch.bfloat16, memory_map=memory_map)
    assert_equal_models(model, random_model().to(torch.bfloat16))
    assert model.config.dtype == "bfloat16"


@pytest.mark.parametrize("adapter", [LoraConfig(r=3), DoraConfig(r=3), PrefixConfig(num_prefix_tokens=3)], ids=str)
def test_linear_weights_in_the_format_of_the_products_train_as_in_fp32(tmp_path: Path, adapter: Adapter) -> None:
    """Loss and gradients bit for bit; DoRA's norms are those of the rounded weights."""
    write_random_model(tmp_path, dtype=torch.float32)
    tokens = torch.randint(4, 64, (24,), generator=torch.Generator().manual_seed(0))
    found = []
    for linear_dtype in (torch.bfloat16, None):
        model = load_model(tmp_path, dtype=torch.float32, linear_dtype=linear_dtype, memory_map=False)
        linears = {name for name, p in model.named_parameters() if p.dim() == 2 and name != EMBEDDING}
        assert {name for name, p in model.named_parameters() if p.dtype is torch.bfloat16} == (
            linears if linear_dtype else set()
        )
        if isinstance(adapter, DoraConfig):  # so that norms are equal
            for name in linears:
                model.get_parameter(name).data.copy_(model.get_parameter(name).bfloat16())
        apply_adapter(model, adapter, torch.Generator().manual_seed(1))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.transformer(tokens, Documents.packed((10, 14)))
        hidden.square().sum().backward()
        found.append([hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 1
    for rounded, expected in zip(*found, strict=True):
        assert torch.equal(rounded, expected)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("layout", ["safetensors", "bin", "legacy bin", "sharded bin"])
def test_layouts_of_other_writers(checkpoint: Path, layout: str, prefix: str) -> None:
    """With and without "transformer.", the tied head and a 2022 mask buffer, in every kind of file."""
    state = {prefix + name.removeprefix("transformer."): value for name, value in state_of(checkpoint).items()}
    state["lm_head.weight"] = state[prefix + "word_embeddings.weight"].clone()
    state[prefix + "h.0.self_attention.scale_mask_softmax.causal_mask"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    if layout == "safetensors":
        rewrite(checkpoint, state)
    elif layout == "sharded bin":
        (checkpoint / "model.safetensors").unlink()
        parts = {
            "pytorch_model-00001-of-00002.bin": list(state)[::2],
            "pytorch_model-00002-of-00002.bin": list(state)[1::2],
        }
        for file, names in parts.items():
            torch.save({name: state[name] for name in names}, checkpoint / file)
        weight_map = {name: file for file, names in parts.items() for name in names}
        (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        write_bin(checkpoint, state, _use_new_zipfile_serialization=layout == "bin")
    assert_equal_models(load_model(checkpoint), random_model())


def test_head_that_is_not_the_embedding_is_refused(checkpoint: Path) -> None:
    state = state_of(checkpoint)
    state["lm_head.weight"] = state[EMBEDDING].clone()
    state["lm_head.weight"][-1, -1] += 1
    rewrite(checkpoint, state)
    with pytest.raises(CheckpointError, match=r"lm_head.weight holds other values.*not tied"):
        load_model(checkpoint)
    rewrite(checkpoint, state | {"lm_head.weight": torch.zeros(3, 32)})
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \(3, 32\), the embedding \(101, 32\)"):
        load_model(checkpoint)


def test_all_differences_are_named_at_once(checkpoint: Path) -> None:
    state = state_of(checkpoint)
    for name in [name for name in state if ".h.0." in name]:
        del state[name]
    state["score.weight"] = torch.zeros(2, 32)
    state[LN_F] = torch.zeros(16)
    rewrite(checkpoint, state)
    with pytest.raises(CheckpointError) as caught:
        load_model(checkpoint)
    message = str(caught.value)
    assert "12 tensors are missing: transformer.h.0.input_layernorm.weight" in message
    assert "and 7 more" in message
    assert "1 tensors do not belong to it: transformer.score.weight" in message
    assert f"{LN_F} (found [16], expected [32])" in message
    assert str(checkpoint) in message


def test_integer_weights_are_refused(checkpoint: Path) -> None:
    rewrite(checkpoint, state_of(checkpoint) | {LN_F: torch.ones(32, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"quantised.*ln_f.weight \(torch.int8\)"):
        load_model(checkpoint)


def test_same_tensor_in_two_shards(tmp_path: Path) -> None:
    write_random_model(tmp_path, max_shard_size_bytes=40_000)
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second, {"format": "pt"})
    with pytest.raises(CheckpointError, match="twice"):
        load_model(tmp_path)


def cut(path: Path, size_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:size_bytes])


def change_header(path: Path, change) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: cut(path, path.stat().st_size - 1), "cut short or damaged: it has .* bytes, its header says"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "its header says"),
        (lambda path: cut(path, 100), "cut short or not a safetensors file"),
        (lambda path: cut(path, 3), "cut short or not a safetensors file"),
        (lambda path: path.write_bytes(b""), "cut short or not a safetensors file: its 0 bytes"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n" * 4), "git-lfs"),
        (lambda path: path.write_bytes(struct.pack("<Q", 4) + b"oops"), "header is not JSON"),
        (lambda path: path.write_bytes(struct.pack("<Q", 2) + b"[]"), "header is not a JSON object"),
        (
            lambda path: change_header(path, lambda h: h[LN_F].pop("shape")),
            f"the entry .* for {LN_F}; expected a shape",
        ),
        (
            lambda path: change_header(path, lambda h: h[LN_F].update(dtype="F4")),
            f"the entry .* for {LN_F}; expected a shape",
        ),
        (
            lambda path: change_header(path, lambda h: h[LN_F].update(shape=[31])),
            r"'shape': \[31\], .* data_offsets that agree",
        ),
        (
            lambda path: change_header(path, lambda h: h[LN_F].update(data_offsets=h[EMBEDDING]["data_offsets"])),
            "data_offsets that agree",
        ),
        (
            lambda path: change_header(path, lambda h: h[LN_F].update(h["transformer.ln_f.bias"])),
            "overlap others or leave a gap",
        ),
    ],
)
def test_damaged_safetensors(checkpoint: Path, damage, message: str) -> None:
    damage(checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_model(checkpoint)


def test_damaged_bin(checkpoint: Path) -> None:
    write_bin(checkpoint, state_of(checkpoint))
    whole = (checkpoint / "pytorch_model.bin").read_bytes()
    for size_bytes in (0, 10, len(whole) // 2, len(whole) - 10):
        (checkpoint / "pytorch_model.bin").write_bytes(whole[:size_bytes])
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            load_model(checkpoint)


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [({"x": Evil()}, "Python objects"), ([1], "state dict"), ({"a": 1}, "state dict")],
)
def test_bin_with_anything_but_tensors_is_refused(checkpoint: Path, capfd, content: object, message: str) -> None:
    write_bin(checkpoint, content)
    with pytest.raises(CheckpointError, match=message):
        load_model(checkpoint)
    assert "must not run" not in capfd.readouterr().out


def test_damaged_index_is_refused(tmp_path: Path) -> None:
    write_random_model(tmp_path, max_shard_size_bytes=40_000)
    index = tmp_path / "model.safetensors.index.json"
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"these are missing: {shard.name}"):
        load_model(tmp_path)
    shard.write_bytes(content)
    whole = index.read_text()
    for broken in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../x"}}'):
        index.write_text(broken)
        with pytest.raises(CheckpointError, match="is not an index of shards"):
            load_model(tmp_path)
    index.write_text(whole)
    assert_equal_models(load_model(tmp_path), random_model())


def test_damaged_or_missing_config_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "config.json"
    for content, message in (
        ("{", "cannot be read: Expecting"),
        ("[]", "holds list"),
        ('{"model_type": "gpt2"}', "gpt2"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            load_model(checkpoint)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json, so it is not a model; it holds weights: put"):
        load_model(checkpoint)
    (checkpoint / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter: give its base model"):
        load_model(checkpoint)


def test_directory_without_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights.*found config.json, generation_config.json"):
        load_model(checkpoint)


def test_slices_and_entries(checkpoint: Path) -> None:
    reader = open_reader(checkpoint, read_config(checkpoint))
    expected = {name: p.detach() for name, p in random_model().named_parameters()}
    assert {name: entry.shape for name, entry in reader.entries.items()} == {
        n: tuple(p.shape) for n, p in expected.items()
    }
    assert torch.equal(reader.read_box(EMBEDDING, ((10, 20), (0, 32))), expected[EMBEDDING][10:20])
    assert torch.equal(reader.read_box(EMBEDDING, ((0, 20), (3, 4))), expected[EMBEDDING][:20, 3:4])


def test_unaligned_data(checkpoint: Path) -> None:
    """One more byte in the header misaligns every tensor."""
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    path.write_bytes(struct.pack("<Q", length + 1) + content[8 : 8 + length] + b" " + content[8 + length :])
    model = load_model(checkpoint)
    assert_equal_models(model, random_model())
    assert all(p.data_ptr() % 4 == 0 for p in model.parameters())


def test_changing_a_mapped_model_does_not_change_the_file(checkpoint: Path) -> None:
    before = (checkpoint / "model.safetensors").read_bytes()
    model = load_model(checkpoint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (checkpoint / "model.safetensors").read_bytes() == before
    assert_equal_models(load_model(checkpoint), random_model())


def test_replacing_the_file_does_not_change_a_mapped_model(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    (checkpoint / "other").write_bytes(b"short")
    (checkpoint / "other").replace(checkpoint / "model.safetensors")
    assert_equal_models(model, random_model())


def test_owned_memory_survives_a_file_that_is_cut_short(checkpoint: Path) -> None:
    model = load_model(checkpoint, memory_map=False)
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.truncate(0)
    assert_equal_models(model, random_model())


def test_file_that_changes_while_it_is_read(checkpoint: Path) -> None:
    file = SafetensorsFile(checkpoint / "model.safetensors")
    rewrite(checkpoint, state_of(checkpoint) | {"more": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        file.read(LN_F)


def test_saving_one_mapped_parameter_saves_only_that_one(checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(checkpoint)
    torch.save(model.transformer.ln_f.weight, tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 4096
    assert isinstance(model, BloomForCausalLM)


PEAK = """
import gc, sys
import torch
from bloomlm.checkpoint.reader import load_model
def peak(kind):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))
load_model(sys.argv[1], dtype=getattr(torch, sys.argv[3]), memory_map=sys.argv[4] == "True")  # warm: lazy imports, allocator
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again from now
before = peak("VmRSS")
model = load_model(sys.argv[2], dtype=getattr(torch, sys.argv[3]), memory_map=sys.argv[4] == "True")
sum(p.sum().item() for p in model.parameters())  # touch what was mapped
print(peak("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("stored", "asked", "memory_map"),
    [
        ("float32", "float32", True),
        ("float32", "float32", False),
        ("float16", "float32", True),
        ("float32", "bfloat16", True),
    ],
)
def test_peak_memory_is_one_copy_and_one_tensor(tmp_path: Path, stored: str, asked: str, memory_map: bool) -> None:
    config = dataclasses.replace(TINY, hidden_size=512, n_head=8, n_layer=4, vocab_size=8192)
    with torch.device("meta"):
        parameters = dict(BloomForCausalLM(config).named_parameters())
    (tmp_path / "large").mkdir()
    zeros = ((name, torch.zeros(p.shape, dtype=getattr(torch, stored))) for name, p in parameters.items())
    write_model(tmp_path / "large", config, zeros)
    write_random_model(tmp_path / "small")
    arguments = [str(tmp_path / "small"), str(tmp_path / "large"), asked, str(memory_map)]
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one_copy = config.num_parameters * getattr(torch, asked).itemsize
    one_tensor = max(p.numel() for p in parameters.values()) * getattr(torch, stored).itemsize
    slack = 4 * 2**20
    assert one_copy * 0.9 < int(done.stdout) < one_copy + one_tensor + slack


def test_loading_imports_neither_compiler_nor_shards(checkpoint: Path) -> None:
    """Each takes half a second. An embedding that draws its weight without memory would ask for the compiler."""
    code = (
        "import sys, torch, bloomlm.api; from bloomlm.checkpoint.reader import load_model\n"
        "with torch.inference_mode(): load_model(sys.argv[1])(torch.arange(3)[None])\n"
        "slow = ('torch._dynamo', 'torch._inductor', 'torch.distributed.tensor', 'torch.distributed.fsdp', 'sympy')\n"
        "print([name for name in slow if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(checkpoint)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
