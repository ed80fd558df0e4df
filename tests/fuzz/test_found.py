"""What the fuzzer found, each as the smallest file that shows it. Before, each of these was a traceback, a crash or worse."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import bloomlm
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint.adapters.load import adapter_base_config, load_adapter
from bloomlm.checkpoint.paddle.program import read_program_weights
from bloomlm.checkpoint.reader import load_model, read_config
from bloomlm.checkpoint.safetensors_file import SafetensorsFile
from bloomlm.checkpoint.training_state import find_damage, load_training_state, save_training_state
from bloomlm.cli.options import config_flags, read_run_file
from bloomlm.data.chat_template import read_chat_template
from bloomlm.data.files import FileRows
from bloomlm.data.text_sources import read_mixture
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import AdapterError, BloomlmError, CheckpointError, ConfigError, DataError, ProgramError
from bloomlm.evaluation.report import read_report
from bloomlm.files.json_text import parse_json
from bloomlm.runtime import Program
from bloomlm.training.config import TrainingConfig
from bloomlm.training.report import MetricsFile
from tests.bloom_tokenizer import make_tokenizer
from tests.fuzz.mutators import YAML_BOMB, Evil
from tests.paddle_files import write as write_pickle
from tests.tiny_bloom import write_adapter, write_bloom

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bloom(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    """A copy of the base model to damage."""
    return shutil.copytree(base, tmp_path / "model")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, "9" * 5000, '"\\ud800"', b"\xff", b"\xef\xbb\xbf{}"])
def test_json_is_wrong_in_one_way_only(text: str | bytes) -> None:
    with pytest.raises(json.JSONDecodeError):
        parse_json(text)
    assert parse_json('"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_nested_json_beside_a_model(model: Path, name: str) -> None:
    (model / name).write_text(DEEP)
    with pytest.raises(BloomlmError, match=rf"{name}.*nested too deeply"):
        bloomlm.load(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 5}, "not divisible by n_head 5"),
        ({"hidden_dropout": "x"}, "hidden_dropout is 'x'"),
        ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon is 'x'"),
        ({"vocab_size": 2**63 - 1}, "expected at most"),
        ({"hidden_size": 2**40}, "expected at most"),
    ],
)
def test_a_config_is_named_and_its_sizes_have_bounds(model: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(model / "config.json", **changes)
    with pytest.raises(ConfigError, match=rf"{model}/config\.json: .*{message}"):
        read_config(model)


def as_torch_file(model: Path) -> Path:
    """Replace the weights by a pytorch_model.bin."""
    torch.save(load_model(model).state_dict(), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    return model / "pytorch_model.bin"


def test_a_torch_file_that_is_no_pickle_at_all(model: Path) -> None:
    as_torch_file(model).write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
        load_model(model)


def test_a_torch_file_runs_no_code(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    as_torch_file(model).write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_model(model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", "model"]


def test_tensors_of_a_torch_file_cannot_be_larger_than_the_file(model: Path) -> None:
    path = as_torch_file(model)
    state = torch.load(path, weights_only=True)
    shapes = {name: tensor.shape for name, tensor in state.items()}
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, path)
    with pytest.raises(CheckpointError, match="its tensors would take"):
        load_model(model)


def test_a_torch_file_cannot_be_compressed(model: Path) -> None:
    path = as_torch_file(model)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="compressed entries"):
        load_model(model)


@pytest.mark.parametrize("shard", ["x" * 300, "a\0b", "../model.safetensors", "/etc/passwd"])
def test_an_index_names_impossible_files(model: Path, shard: str) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load_model(model)


@pytest.mark.parametrize("shape", ["[Infinity]", "[1.5]", "[true]", "[1e999]"])
def test_sizes_in_a_header_that_are_no_whole_numbers(tmp_path: Path, shape: str) -> None:
    header = f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,4]}}}}'.encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"a\.safetensors is damaged"):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_a_paddle_program_that_places_data_beyond_all_files(tmp_path: Path) -> None:
    (tmp_path / "bloom.pdiparams").write_bytes(b"\0" * 4 + b"\x01" + b"\0" * 7 + b"\xff" * 8 + b"\0" * 40)
    write_pickle(tmp_path / "bloom.pdiparams.info", {"a": {"structured_name": "b"}})
    with pytest.raises(CheckpointError, match=r"bloom\.pdiparams is damaged"):
        read_program_weights(tmp_path / "bloom.pdiparams")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": float("nan")}, "of another kind"),
        ({"r": float("inf")}, "of another kind"),
        ({"r": 2**63}, "expected a number from 1"),
        ({"rank_pattern": {"dense": 0}}, "expected a number from 1"),
        ({"rank_pattern": {"(": 4}}, "no regular expression"),
        ({"target_modules": r"([a-z_.]+)+!"}, "could take hours"),
        ({"target_modules": ".*.*.*.*.*.*.*.*!"}, "could take hours"),
    ],
)
def test_settings_of_a_lora(base: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, LoraConfig(r=2))
    edit_json(adapter / "adapter_config.json", **changes)
    with pytest.raises(AdapterError, match=rf"the adapter in {adapter}: .*{message}"):
        load_adapter(load_model(base), adapter)


def test_regular_expressions_that_people_use_still_work(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, LoraConfig(r=2))
    edit_json(adapter / "adapter_config.json", target_modules=r".*\.h\.\d+\.(self_attention\.)?query_key_value")
    load_adapter(load_model(base), adapter)


def test_a_token_that_no_model_has(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, LoraConfig(r=2))
    edit_json(adapter / "adapter_config.json", trainable_token_indices=[2**70])
    with pytest.raises(AdapterError, match=rf"{adapter}: trainable_token_indices"):
        adapter_base_config(adapter)


def test_a_projection_with_numbers_that_are_not_finite(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, PrefixConfig(num_prefix_tokens=2, prefix_projection=True))
    path = adapter / "prefix_projection.safetensors"
    path.write_bytes(path.read_bytes()[:-400] + b"\xff" * 400)
    with pytest.raises(AdapterError, match="does not give the prompt_embeddings"):
        load_adapter(load_model(base), adapter)


def test_too_many_virtual_tokens(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, PrefixConfig(num_prefix_tokens=2))
    edit_json(adapter / "adapter_config.json", num_virtual_tokens=2**62)
    with pytest.raises(AdapterError, match=rf"the adapter in {adapter}: num_prefix_tokens"):
        load_adapter(load_model(base), adapter)


def test_a_chat_template_that_is_not_utf_8(tmp_path: Path) -> None:
    make_tokenizer().save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ \xff }}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_rows_from_a_device(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match=f"{name}: is a pipe or a device"):
        FileRows(tmp_path / name)


@pytest.mark.parametrize("content", [f"[{DEEP}", f'[{{"src": {DEEP}', f"[{'9' * 5000}]", '[{"src": "\\ud800"}]'])
def test_a_list_of_rows_with_impossible_values(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(DataError, match=r"rows\.json, line 1: not JSON"):
        list(FileRows(tmp_path / "rows.json").rows())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (DEEP.encode(), "nested too deeply"),
        (YAML_BOMB + b"\nmodel_name_or_path: *k8", "of another kind"),
        (b"a: &a [*a]", "of another kind"),
        (b"x: &a " + b"y" * 1000 + b"\nz: [" + b"*a, " * 1000 + b"*a]", "more than"),
        (b"x" * 300_000, "more than"),
        (b"seed: !!python/object/apply:os.system ['touch marker']", "could not determine a constructor"),
        (b"seed: {a: 1}", "of another kind"),
    ],
)
def test_flags_that_stand_for_too_much(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=f"run.yaml.*{message}") as raised:
        read_run_file(tmp_path / "run.yaml", config_flags(TrainingConfig))
    assert len(str(raised.value)) < 5000


def test_a_log_with_lines_that_are_damaged_continues(tmp_path: Path) -> None:
    lines = [b'{"step": 1}', b"\xff\xfe", DEEP.encode(), b'{"step": 1e999}', b'{"step": 2}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    MetricsFile(tmp_path / "metrics.jsonl", step=1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_log_that_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl cannot be read and written"):
        MetricsFile(tmp_path / "metrics.jsonl", step=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"settings": []}, "settings is"),
        ({"protocol": 1}, "protocol is"),
        ({"model": {}}, "expected fingerprint, dtype"),
    ],
)
def test_a_report_of_another_structure(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    values = {"bloomlm_report": 1, "task": "wikitext", "counts": {}, "metrics": {}, "run": {}, "settings": {}}
    values |= {"protocol": {"name": "a", "version": "1"}, "data": {"name": "b"}}
    values |= {"model": {"fingerprint": "c", "dtype": "float32"}}
    (tmp_path / "report.json").write_text(json.dumps(values))
    assert read_report(tmp_path / "report.json").task == "wikitext"
    edit_json(tmp_path / "report.json", **changes)
    with pytest.raises(DataError, match=message):
        read_report(tmp_path / "report.json")


def test_a_program_beside_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "bloom.json").symlink_to("bloom.json")
    with pytest.raises(ProgramError, match=r"bloom\.json cannot be read"):
        Program(tmp_path / "bloom")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_training_state(tmp_path, {"a": torch.zeros(3)}, {"step": 1})
    return tmp_path


def test_the_index_of_a_training_state_runs_no_code(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    (checkpoint / "training_state" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"posix\.system.*nothing was run"):
        load_training_state(checkpoint, {"a": torch.zeros(3)})
    assert not (tmp_path / "fuzz-marker").exists()


@pytest.mark.parametrize("attack", ["bytes", "outside"])
def test_the_index_of_a_training_state_holds_tensors_only(checkpoint: Path, attack: str) -> None:
    """torch unpickles the values of other kinds without a check, and opens whatever file an index names."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    path = checkpoint / "training_state" / ".metadata"
    index = pickle.loads(path.read_bytes())
    if attack == "bytes":
        index.state_dict_metadata["a"] = BytesStorageMetadata()
    else:
        for place in index.storage_data.values():
            place.relative_path = "../elsewhere.distcp"
    path.write_bytes(pickle.dumps(index))
    message = "BytesStorageMetadata" if attack == "bytes" else "outside of its directory"
    with pytest.raises(CheckpointError, match=message):
        load_training_state(checkpoint, {"a": torch.zeros(3)})


def test_a_training_state_still_loads(checkpoint: Path) -> None:
    tensors = {"a": torch.ones(3)}
    assert load_training_state(checkpoint, tensors) == {"step": 1}
    assert tensors["a"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("files", "message"), [("a", "cannot be read"), (5, "cannot be read"), ({"a": "x"}, "missing")]
)
def test_a_manifest_of_another_shape(tmp_path: Path, files: object, message: str) -> None:
    (tmp_path / "checkpoint_manifest.json").write_text(json.dumps({"files": files}))
    assert message in str(find_damage(tmp_path))


def test_a_message_does_not_repeat_a_whole_file() -> None:
    assert len(str(CheckpointError("x" * 10**6))) < 4000
    assert str(CheckpointError("x" * 4000)) == "x" * 4000


@pytest.mark.parametrize("name", ["x" * 300 + ".txt", "~no-such-user/a.txt", "loop.txt", "/none.txt"])
def test_a_mixture_of_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "mixture.yaml").write_text(f"[{{name: a, path: {name}, weight: 1}}]")
    with pytest.raises(DataError, match=f"mixture.yaml, source 1: .*{name[:20]}"):
        read_mixture(tmp_path / "mixture.yaml").sources[0].inputs()


def test_a_device_is_no_chat_template(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="it is no file"):
        read_chat_template(str(tmp_path / "chat.jinja"))
