"""Files under many ranks: each reads its parts and no more, and what is written is plain and whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bloomlm.adapters.base import adapter_of, apply_adapter
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint import safetensors_file
from bloomlm.checkpoint.adapters.load import load_adapter
from bloomlm.checkpoint.adapters.peft import gather_adapter, save_adapter
from bloomlm.checkpoint.main_rank import failing_together, one_directory
from bloomlm.checkpoint.merge import merge_to_directory
from bloomlm.checkpoint.reader import load_model
from bloomlm.checkpoint.writer import write_model
from bloomlm.errors import CheckpointError, ConfigError
from bloomlm.files.atomic import atomic_directory
from bloomlm.kernels.compiled import load_operators
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.parallel.data_parallel import shard_model
from bloomlm.parallel.layout import whole_tensor
from bloomlm.parallel.mesh import Degrees, Mesh
from bloomlm.parallel.tensor_parallel import cut_adapter, cut_model
from tests.distributed.models import Case, tiny_model
from tests.distributed.pool import RankError, RankPool
from tests.paddle_files import cut, paddle_state, write, write_config
from tests.tiny_checkpoint import random_model

load_operators()  # in this process and in those of ranks, which import this module: they must compute the same bits
SETUPS = {
    "tp 2": Degrees(tp=2),
    "tp 4": Degrees(tp=4),
    "fsdp 2": Degrees(dp_shard=2),
    "fsdp 4": Degrees(dp_shard=4),
    "tp 2 x fsdp 2": Degrees(tp=2, dp_shard=2),
    "dp 2 x fsdp 2": Degrees(dp_replicate=2, dp_shard=2),
}
CONFIG = BloomConfig(vocab_size=208, hidden_size=64, n_layer=2, n_head=4)


def wholes(model: BloomForCausalLM, mesh: Mesh) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        whole = whole_tensor(name, parameter, mesh)
        assert whole is not None
        found[name] = whole.clone()
    return found


def read_parts(directory: Path, degrees: Degrees, dtype: torch.dtype | None) -> tuple[dict[str, Any], int, int]:
    """What all ranks read together, the bytes that this one asked the system for, and those it holds."""
    mesh = Mesh.over_all_ranks(degrees, "cpu")
    load_model(directory, dtype=dtype, mesh=mesh)  # what Python imports on the way is not counted
    before = _read_bytes()
    model = load_model(directory, dtype=dtype, mesh=mesh)
    read_bytes = _read_bytes() - before
    held = sum(getattr(p, "_local_tensor", p).nbytes for p in model.parameters())
    return wholes(model, mesh), read_bytes, held


def _read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])


@pytest.mark.parametrize("setup", SETUPS)
def test_a_rank_reads_its_parts_and_no_more(ranks: RankPool, tmp_path: Path, setup: str) -> None:
    expected = random_model(BloomConfig(vocab_size=2080, hidden_size=64, n_layer=2, n_head=4))
    write_model(tmp_path, expected.config, expected.named_parameters())
    degrees = SETUPS[setup]
    total = 0
    header_bytes = 10_000  # the file's header and config.json, which a model of any size has
    for found, read_bytes, held in ranks.run(degrees.world_size, read_parts, tmp_path, degrees, None):
        assert found.keys() == dict(expected.named_parameters()).keys()
        for name, parameter in expected.named_parameters():
            assert torch.equal(found[name], parameter), name
        assert read_bytes - header_bytes <= 1.05 * held
        total += held
    whole_bytes = sum(p.nbytes for p in expected.parameters())
    assert total >= whole_bytes * degrees.dp_replicate
    assert total <= 1.2 * whole_bytes * degrees.dp_replicate


@pytest.mark.parametrize("setup", ["tp 2", "tp 4", "fsdp 2"])
@pytest.mark.parametrize("saved_by", [1, 4])
def test_paddlenlp_files_of_another_degree(ranks: RankPool, tmp_path: Path, saved_by: int, setup: str) -> None:
    expected = random_model(BloomConfig(vocab_size=2080, hidden_size=64, n_layer=2, n_head=4))
    write_config(tmp_path, expected.config)
    for tp_rank in range(saved_by):
        name = "model_state.pdparams" if saved_by == 1 else f"model_state.tp{tp_rank:02}.pdparams"
        write(tmp_path / name, cut(paddle_state(expected), saved_by, tp_rank))
    for found, read_bytes, held in ranks.run(SETUPS[setup].world_size, read_parts, tmp_path, SETUPS[setup], None):
        for name, parameter in expected.named_parameters():
            assert torch.equal(found[name], parameter), name
        if saved_by == 1:  # of what lies whole in several files, every copy is read and compared
            assert read_bytes - 100_000 <= 1.05 * held


def test_another_precision(ranks: RankPool, tmp_path: Path) -> None:
    expected = random_model(CONFIG)
    write_model(tmp_path, expected.config, expected.named_parameters(), max_shard_size_bytes=100_000)
    found, _, _ = ranks.run(4, read_parts, tmp_path, SETUPS["tp 2 x fsdp 2"], torch.bfloat16)[3]
    for name, parameter in expected.named_parameters():
        assert torch.equal(found[name], parameter.bfloat16()), name


def write_from_ranks(directory: Path, degrees: Degrees, dtype: torch.dtype | None) -> list[str]:
    """Each rank's files."""
    mesh = Mesh.over_all_ranks(degrees, "cpu")
    model = random_model(CONFIG)
    cut_model(model, mesh)
    cut_adapter(model, mesh)
    shard_model(model, mesh)
    opened: list[str] = []
    real_open = Path.open

    def noting_open(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode == "xb":
            opened.append(path.name)
        return real_open(path, mode, *args, **options)

    Path.open = noting_open  # type: ignore[method-assign, assignment]
    try:
        with one_directory(atomic_directory(directory), mesh) as temporary:
            write_model(
                temporary, model.config, model.named_parameters(), dtype=dtype, max_shard_size_bytes=60_000, mesh=mesh
            )
    finally:
        Path.open = real_open  # type: ignore[method-assign]
    return opened


@pytest.mark.parametrize("setup", SETUPS)
def test_files_are_those_of_one_rank(ranks: RankPool, tmp_path: Path, setup: str) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    model = random_model(CONFIG)
    write_model(alone, model.config, model.named_parameters(), max_shard_size_bytes=60_000)
    opened = ranks.run(SETUPS[setup].world_size, write_from_ranks, tmp_path / "ranks", SETUPS[setup], None)
    files = {path.name for path in alone.iterdir()}
    assert len(files) > 6
    assert {path.name for path in (tmp_path / "ranks").iterdir()} == files
    for name in files:
        assert (tmp_path / "ranks" / name).read_bytes() == (alone / name).read_bytes(), name
    writers = sum(bool(names) for names in opened)
    assert writers == SETUPS[setup].world_size // SETUPS[setup].dp_replicate
    assert sorted(name for names in opened for name in names) == sorted(n for n in files if n.startswith("model-"))


def fail_on_last_rank(directory: Path) -> str:
    mesh = Mesh.over_all_ranks(Degrees(tp=2), "cpu")
    model = random_model(CONFIG)
    cut_model(model, mesh)
    if mesh.rank == 1:
        real = safetensors_file.raw_bytes

        def full_disk(tensor: torch.Tensor) -> memoryview:
            if tensor.shape[0] == 3 * 64:
                raise OSError(28, "No space left on device")
            return real(tensor)

        import bloomlm.checkpoint.writer as writer

        writer.raw_bytes = full_disk
    try:
        with one_directory(atomic_directory(directory), mesh) as temporary:
            write_model(temporary, model.config, model.named_parameters(), max_shard_size_bytes=60_000, mesh=mesh)
    except CheckpointError as error:
        return str(error)
    finally:
        if mesh.rank == 1:
            writer.raw_bytes = real
    return "no error"


def test_a_full_disk_on_one_rank_fails_on_all_and_leaves_what_was_there(ranks: RankPool, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "older").write_text("model")
    messages = ranks.run(2, fail_on_last_rank, directory)
    assert all("No space left on device" in message for message in messages)
    assert messages[0].startswith("rank 1: ")
    assert [path.name for path in directory.iterdir()] == ["older"]
    assert list(tmp_path.iterdir()) == [directory]


def fail_on_main_rank(directory: Path) -> str:
    """What a rank says when the main rank writes the weights and cannot write the configuration."""
    mesh = Mesh.over_all_ranks(Degrees(tp=2), "cpu")
    model = random_model(CONFIG)
    cut_model(model, mesh)
    try:
        with one_directory(atomic_directory(directory), mesh) as temporary:
            if mesh.is_main:
                (temporary / "config.json").mkdir()
            with failing_together(mesh):
                write_model(temporary, model.config, model.named_parameters(), max_shard_size_bytes=60_000, mesh=mesh)
            torch.distributed.barrier()  # as in what saves the state of training afterwards
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_no_rank_waits_for_one_that_cannot_write_a_small_file(ranks: RankPool, tmp_path: Path) -> None:
    messages = ranks.run(2, fail_on_main_rank, tmp_path / "model")
    assert all("Is a directory" in message for message in messages)
    assert messages[1].startswith("rank 0: ")
    assert not list(tmp_path.iterdir())


ADAPTERS = {
    "lora": LoraConfig(r=3, target_modules=BLOCK_LINEARS),
    "dora": DoraConfig(r=3, target_modules=BLOCK_LINEARS),
    "rows of the embedding": LoraConfig(r=3, trained_tokens=(47, 5, 20)),
    "prefix": PrefixConfig(num_prefix_tokens=3),
    "projected prefix": PrefixConfig(num_prefix_tokens=3, prefix_projection=True),
}


def write_adapter(directory: Path, name: str, degrees: Degrees) -> None:
    mesh = Mesh.over_all_ranks(degrees, "cpu")
    model = tiny_model(Case(adapter=ADAPTERS[name]))
    cut_model(model, mesh)
    cut_adapter(model, mesh)
    shard_model(model, mesh)
    holder = gather_adapter(model, mesh)
    if mesh.is_main:
        directory.mkdir()
        save_adapter(holder, directory, "base")


@pytest.mark.parametrize("setup", ["tp 4", "fsdp 2", "tp 2 x fsdp 2"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_files_are_those_of_one_rank(ranks: RankPool, tmp_path: Path, name: str, setup: str) -> None:
    (tmp_path / "alone").mkdir()
    save_adapter(tiny_model(Case(adapter=ADAPTERS[name])), tmp_path / "alone", "base")
    ranks.run(SETUPS[setup].world_size, write_adapter, tmp_path / "ranks", name, SETUPS[setup])
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "ranks" / path.name).read_bytes() == path.read_bytes(), path.name
    fresh = tiny_model(Case())
    load_adapter(fresh, tmp_path / "ranks")
    assert type(adapter_of(fresh)) is type(ADAPTERS[name])


def load_with_adapter(directory: Path, name: str, degrees: Degrees) -> tuple[dict[str, torch.Tensor], list[bool]]:
    mesh = Mesh.over_all_ranks(degrees, "cpu")
    generator = torch.Generator().manual_seed(4)
    model = load_model(
        directory,
        mesh=mesh,
        install_adapter=lambda model: apply_adapter(model, ADAPTERS[name], generator, torch.device("cpu")),
    )
    ADAPTERS[name].start_from_weights(model)
    return wholes(model, mesh), [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("setup", ["tp 2", "fsdp 2", "tp 2 x fsdp 2"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_fresh_adapters_are_those_of_one_rank(ranks: RankPool, tmp_path: Path, name: str, setup: str) -> None:
    base = random_model(CONFIG)
    write_model(tmp_path, base.config, base.named_parameters())
    expected = load_model(tmp_path)
    apply_adapter(expected, ADAPTERS[name], torch.Generator().manual_seed(4))
    for found, learns in ranks.run(SETUPS[setup].world_size, load_with_adapter, tmp_path, name, SETUPS[setup]):
        assert found.keys() == dict(expected.named_parameters()).keys()
        for parameter_name, parameter in expected.named_parameters():
            if parameter_name.endswith("lora_magnitude_vector"):  # ranks add up the squares of some rows
                torch.testing.assert_close(found[parameter_name], parameter.detach(), rtol=1e-6, atol=0)
            else:
                assert torch.equal(found[parameter_name], parameter), parameter_name
        assert learns == [p.requires_grad for p in expected.parameters()]


def merge_on_ranks(directory: Path, name: str, degrees: Degrees) -> None:
    mesh = Mesh.over_all_ranks(degrees, "cpu")
    model = tiny_model(Case(adapter=ADAPTERS[name]))
    cut_model(model, mesh)
    cut_adapter(model, mesh)
    shard_model(model, mesh)
    merge_to_directory(model, directory, mesh=mesh)


@pytest.mark.parametrize("setup", ["tp 4", "fsdp 2", "tp 2 x fsdp 2"])
@pytest.mark.parametrize("name", ["lora", "dora", "rows of the embedding"])
def test_merged_weights_are_those_of_one_rank(ranks: RankPool, tmp_path: Path, name: str, setup: str) -> None:
    merge_to_directory(tiny_model(Case(adapter=ADAPTERS[name])), tmp_path / "alone")
    ranks.run(SETUPS[setup].world_size, merge_on_ranks, tmp_path / "ranks", name, SETUPS[setup])
    found = dict(load_model(tmp_path / "ranks").named_parameters())
    for parameter_name, parameter in load_model(tmp_path / "alone").named_parameters():
        torch.testing.assert_close(found[parameter_name], parameter, rtol=1e-5, atol=1e-6)


def load_into_three(directory: Path) -> str:
    try:
        load_model(directory, mesh=Mesh.over_all_ranks(Degrees(tp=3), "cpu"))
    except ConfigError as error:
        return str(error)
    return "loaded"


def test_impossible_degrees_are_refused_before_anything_is_read(ranks: RankPool, tmp_path: Path) -> None:
    base = random_model(CONFIG)
    write_model(tmp_path, base.config, base.named_parameters())
    for message in ranks.run(3, load_into_three, tmp_path):
        assert "4 heads, which cannot be divided by 3" in message and "1, 2, 4 would work" in message


def test_index_names_every_tensor(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(4, write_from_ranks, tmp_path / "ranks", SETUPS["tp 4"], torch.bfloat16)
    index = json.loads((tmp_path / "ranks" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == dict(random_model(CONFIG).named_parameters()).keys()
    loaded = load_model(tmp_path / "ranks")
    for name, parameter in random_model(CONFIG).named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.bfloat16()), name


def test_errors_of_ranks_reach_the_test(ranks: RankPool) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1: .*ZeroDivisionError"):
        ranks.run(2, divide_by_rank)


def divide_by_rank() -> float:
    return 1 / (1 - torch.distributed.get_rank())
