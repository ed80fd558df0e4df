"""Names of models: builtin, directories, and a hub, which here is a local server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bloomlm.checkpoint.reader import load_model
from bloomlm.checkpoint.source import resolve_source
from bloomlm.errors import CheckpointError
from tests.hub_server import serve_hub
from tests.tiny_checkpoint import write_random_model

# In a process of its own: the hub client reads its environment once, when imported.
LOAD = """
import json, sys
from bloomlm.checkpoint.source import resolve_source
from bloomlm.errors import CheckpointError
try:
    directory = resolve_source(sys.argv[1], *sys.argv[2:]).directory
except CheckpointError as error:
    print(json.dumps({"error": str(error)}))
    sys.exit()
files = sorted(p.name for p in directory.iterdir())
if "adapter_config.json" in files:
    print(json.dumps({"files": files}))
    sys.exit()
from bloomlm.checkpoint.reader import load_model  # brings in torch
total = sum(p.double().sum().item() for p in load_model(*sys.argv[1:2]).parameters())
print(json.dumps({"files": files, "total": total}))
"""


def run_load(cache: Path, *arguments: str, endpoint: str, offline: bool = False) -> dict[str, object]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def hub_root(tmp_path: Path) -> Path:
    root = tmp_path / "hub"
    repository = root / "org" / "tiny"
    write_random_model(repository)
    for extra in ("tokenizer.json", "README.md", "pytorch_model.bin", "onnx/config.json", "flax_model.msgpack"):
        (repository / extra).parent.mkdir(exist_ok=True)
        (repository / extra).write_text("{}")
    return root


def total_of(directory: Path) -> float:
    return sum(p.double().sum().item() for p in load_model(directory).parameters())


def test_hub_name_is_fetched_then_used_offline(hub_root: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with serve_hub(hub_root) as hub:
        online = run_load(cache, "org/tiny", endpoint=hub.url)
        offline = run_load(cache, "org/tiny", endpoint=hub.url, offline=True)
    server_gone = run_load(cache, "org/tiny", endpoint=hub.url)
    needed = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert online == {"files": needed, "total": total_of(hub_root / "org/tiny")}
    assert sorted(hub.fetched) == needed  # each once: neither the .bin twin nor other frameworks' weights
    assert offline == server_gone == online


def test_hub_repository_with_only_bin_weights(hub_root: Path, tmp_path: Path) -> None:
    repository = hub_root / "org" / "tiny"
    state = dict(write_random_model(tmp_path / "twin").named_parameters())
    (repository / "model.safetensors").unlink()
    torch.save({name: p.detach() for name, p in state.items()}, repository / "pytorch_model.bin")
    cache = tmp_path / "cache"
    with serve_hub(hub_root) as hub:
        online = run_load(cache, "org/tiny", endpoint=hub.url)
    assert "pytorch_model.bin" in online["files"]
    assert online["total"] == total_of(tmp_path / "twin")
    assert run_load(cache, "org/tiny", endpoint=hub.url, offline=True) == online


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_hub_adapter(tmp_path: Path, weights: str) -> None:
    repository = tmp_path / "hub" / "org" / "adapter"
    repository.mkdir(parents=True)
    for file in ("adapter_config.json", weights, "README.md", "training_args.pt"):
        (repository / file).write_text("{}")
    with serve_hub(tmp_path / "hub") as hub:
        found = run_load(tmp_path / "cache", "org/adapter", endpoint=hub.url)
    assert found == {"files": ["adapter_config.json", weights]}


def test_hub_refusals_say_what_to_do(hub_root: Path, tmp_path: Path) -> None:
    with serve_hub(hub_root, gated=("org/tiny",)) as hub:
        gated = run_load(tmp_path / "a", "org/tiny", endpoint=hub.url)["error"]
        unknown = run_load(tmp_path / "a", "org/absent", endpoint=hub.url)["error"]
    with serve_hub(hub_root) as hub:
        revision = run_load(tmp_path / "b", "org/tiny", "v9", endpoint=hub.url)["error"]
        offline = run_load(tmp_path / "c", "org/tiny", endpoint=hub.url, offline=True)["error"]
    unreachable = run_load(tmp_path / "d", "org/tiny", endpoint=hub.url)["error"]
    assert "gated" in gated and "hf auth login" in gated
    assert "neither a directory here nor a repository" in unknown
    assert "no revision 'v9'" in revision
    assert "cache" in offline and "HF_HUB_OFFLINE" in offline
    assert "cannot be reached" in unreachable


def test_directory_and_revision(tmp_path: Path) -> None:
    source = resolve_source(str(tmp_path))
    assert (source.directory, source.name) == (tmp_path, str(tmp_path))
    with pytest.raises(CheckpointError, match="is on this machine"):
        resolve_source(str(tmp_path), "v1")


def test_builtin_model_is_inside_the_package() -> None:
    directory = resolve_source("builtin:tiny").directory
    assert (directory / "config.json").is_file()
    assert directory.parts[-3:] == ("bloomlm", "assets", "tiny")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("builtin:huge", "the built-in models are:.*builtin:tiny"),
        ("builtin:../checkpoint", "the built-in models are"),
        ("./no/such/place", "not a directory, and cannot be a hub name"),
        ("/absent", "not a directory, and cannot be a hub name"),
    ],
)
def test_impossible_names(name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        resolve_source(name)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(CheckpointError, match="is a file; expected the directory"):
        resolve_source(str(path))
