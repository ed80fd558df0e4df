"""export_program: everything that belongs to a program, written beside its place, compared, and put there."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors import safe_open

from bloomlm.checkpoint.atomic import directory_beside
from bloomlm.checkpoint.fingerprint import model_fingerprint
from bloomlm.checkpoint.safetensors_file import write_safetensors
from bloomlm.data.tokenizer import TOKENIZER_FILE, Tokenizer
from bloomlm.errors import BackendMissingError, ConfigError, ProgramError
from bloomlm.export.compile import compile_package, find_compiler, save_graphs, trace_all
from bloomlm.export.formats.gguf import write_gguf
from bloomlm.export.formats.onnx import write_onnx, write_openvino
from bloomlm.export.parity import TEXTS, Parity, compare, comparison_tokens
from bloomlm.export.store import virtual_tokens, weight_entries, write_weights
from bloomlm.export.weights import WeightFormat, weight_format
from bloomlm.generation.decode import BloomLanguageModel
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.runtime.formats.gguf import gguf_file
from bloomlm.runtime.formats.pt2 import weights_file
from bloomlm.runtime.manifest import VIRTUAL, Manifest, describe_file
from bloomlm.runtime.program import Program
from bloomlm.runtime.step import virtual_file
from bloomlm.version import __version__

_LOG = logging.getLogger(__name__)

OnStage = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, from 0.0 to 1.0."""


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was written."""

    path: Path
    """Directory and prefix."""
    files: Mapping[str, int]
    """Name -> bytes."""
    is_compiled: bool
    """Whether there was a compiler."""
    parity: Parity | None
    """The comparison with the model; None where it was left out."""
    not_compared: str | None
    """Why it was left out although it was asked for: what runs the program is not installed."""


def export_program(
    model: BloomForCausalLM,
    tokenizer: Tokenizer,
    path: Path,
    *,
    source: str,
    format: str = "pt2",
    dtype: torch.dtype | None = None,
    quantization: str = "none",
    max_new_tokens: int = 128,
    verify: bool = True,
    on_stage: OnStage = lambda stage, share: None,
) -> ExportResult:
    """Write a model, its adapter folded in, as a program.

    Args:
        model: in eval mode on the CPU; LoRA is added in, a prefix becomes the beginning of every cache.
        tokenizer: written beside it.
        path: directory and prefix, e.g. inference/bloom; an older program of this name is replaced.
        source: what the model is called.
        format: one of runtime.formats.FORMATS.
        dtype: precision of the matrices; None: the model's. onnx and openvino: float32 only.
        quantization: none, int8 or int4; onnx and openvino: none only.
        max_new_tokens: tokens that the program generates where nothing else is said.
        verify: compare with the model, and refuse what differs, where what runs the program is installed.
        on_stage: told how far it is.

    Raises:
        ProgramError: the program differs from the model, or cannot be compiled or written.
        ConfigError, CheckpointError: the model cannot be kept so.
    """
    stored = dtype or model.transformer.dtype
    if format in ("onnx", "openvino"):
        if quantization != "none" or dtype not in (None, torch.float32):
            raise ConfigError(f"--format {format} is written in float32; leave out --dtype and --quantization")
        stored = torch.float32
    with _beside(path) as directory:
        tokenizer.save(directory)
        fingerprint = Tokenizer.from_directory(directory).fingerprint
        _check_neighbours(path, fingerprint)
        details: dict[str, Any] = {}
        if format == "pt2":
            weights = weight_format(quantization, stored)
            details = _write_pt2(directory, path.name, model, weights, on_stage)
        elif format == "gguf":
            tokenizer_json = (directory / TOKENIZER_FILE).read_bytes()
            with _counted(model, on_stage) as count:
                write_gguf(
                    directory / gguf_file(path.name),
                    model,
                    tokenizer_json,
                    name=Path(source).name,
                    dtype=str(stored).removeprefix("torch."),
                    quantization=quantization,
                    on_parameter=count,
                )
        else:
            on_stage("tracing", 0.0)
            (write_onnx if format == "onnx" else write_openvino)(directory, path.name, model)
            virtual = virtual_tokens(model)
            if virtual is not None:
                write_safetensors(directory / virtual_file(path.name), {VIRTUAL: virtual}, {})
        details |= {"tokenizer": fingerprint, "max_new_tokens": max_new_tokens}
        manifest = _manifest(model, source, format, stored, quantization, details)
        manifest = dataclasses.replace(manifest, files=_describe(directory, path.name))
        _write_manifest(directory / f"{path.name}.json", manifest)
        parity, not_compared = None, None
        if verify:
            on_stage("comparing", 0.0)
            try:
                parity = _verify(model, tokenizer, directory / path.name)
            except BackendMissingError as error:
                not_compared = str(error)
        if parity is not None:
            manifest = dataclasses.replace(manifest, parity=dataclasses.asdict(parity))
            _write_manifest(directory / f"{path.name}.json", manifest)
            parity.check(_kind(model, manifest))
    sizes = {name: (path.parent / name).stat().st_size for name in (*manifest.files, f"{path.name}.json")}
    is_compiled = manifest.instruction_set is not None
    return ExportResult(path=path, files=sizes, is_compiled=is_compiled, parity=parity, not_compared=not_compared)


def _write_pt2(
    directory: Path, prefix: str, model: BloomForCausalLM, weights: WeightFormat, on_stage: OnStage
) -> dict[str, Any]:
    """Write weights, functions and, where there is a compiler, the package; what the manifest says of them."""
    entries = weight_entries(model.config, weights, num_virtual_tokens(model))
    with _counted(model, on_stage) as count:
        write_weights(
            directory / weights_file(prefix),
            model,
            weights,
            num_virtual=num_virtual_tokens(model),
            on_parameter=count,
        )
    with safe_open(directory / weights_file(prefix), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in entries if name != VIRTUAL}
    on_stage("tracing", 0.0)
    save_graphs(trace_all(model.config, weights, tensors, for_compiler=False), directory, prefix)
    level = None
    if find_compiler() is None:
        _LOG.warning("no C++ compiler was found (g++ or clang++): the program is written uncompiled, which is slower")
    else:
        on_stage("compiling", 0.0)
        traced = trace_all(model.config, weights, tensors, for_compiler=True)
        level = compile_package(traced, directory, prefix, partial(on_stage, "compiling"))
    described = {name: [str(entry.dtype).removeprefix("torch."), list(entry.shape)] for name, entry in entries.items()}
    return {"weights": described, "instruction_set": level}


def _manifest(
    model: BloomForCausalLM,
    source: str,
    format: str,
    dtype: torch.dtype,
    quantization: str,
    details: Mapping[str, Any],
) -> Manifest:
    return Manifest(
        format=format,
        bloomlm_version=__version__,
        library_versions={"torch": torch.__version__, "safetensors": safetensors.__version__},
        source=source,
        fingerprint=model_fingerprint(model),
        vocab_size=model.config.vocab_size,
        hidden_size=model.config.hidden_size,
        n_layer=model.config.n_layer,
        n_head=model.config.n_head,
        num_virtual_tokens=num_virtual_tokens(model),
        dtype=str(dtype).removeprefix("torch."),
        quantization=quantization,
        special_tokens=special_tokens(model),
        files={},
        **details,
    )


def num_virtual_tokens(model: BloomForCausalLM) -> int:
    """Virtual tokens of the model's prefix; 0 without one."""
    return model.transformer.num_virtual_tokens


def special_tokens(model: BloomForCausalLM) -> dict[str, int | None]:
    """Ids by name, from the model's configuration."""
    return {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


@contextmanager
def _counted(model: BloomForCausalLM, on_stage: OnStage) -> Iterator[Callable[[], None]]:
    """A function to call after each parameter, which tells on_stage the share that is written."""
    total, done = sum(1 for _ in model.parameters()), 0

    def count() -> None:
        nonlocal done
        done += 1
        on_stage("weights", min(1.0, done / total))

    on_stage("weights", 0.0)
    yield count


def _verify(model: BloomForCausalLM, tokenizer: Tokenizer, path: Path) -> Parity:
    prompts, forced = comparison_tokens(tokenizer.encode_batch(TEXTS))
    return compare(BloomLanguageModel(model), Program(path).model, prompts, forced)


def _kind(model: BloomForCausalLM, manifest: Manifest) -> str:
    """Which of parity.LIMITS a program must keep to."""
    if manifest.quantization != "none":
        return manifest.quantization
    source_dtype = str(model.transformer.dtype).removeprefix("torch.")
    # a model in 16 bits rounds every activation, whatever its program does
    kind = source_dtype if manifest.dtype == "float32" else manifest.dtype
    return "llama.cpp" if manifest.format == "gguf" and kind == "float32" else kind


def _describe(directory: Path, prefix: str) -> dict[str, dict[str, Any]]:
    return {path.name: describe_file(path) for path in sorted(directory.glob(f"{prefix}.*"))}


def _write_manifest(path: Path, manifest: Manifest) -> None:
    path.write_text(manifest.to_json(), encoding="utf-8")


def _files_of_older(path: Path) -> list[str]:
    """Files of the program that lies there, the manifest first; what else begins with its name is not ours."""
    manifest = path.with_name(f"{path.name}.json")
    try:
        return [manifest.name, *Manifest.read(manifest).files]
    except ProgramError:
        return []


def _check_neighbours(path: Path, fingerprint: str) -> None:
    """Refuse to replace the tokenizer of other programs in the directory."""
    for other in sorted(path.parent.glob("*.json")):
        try:
            differs = other.stem != path.name and Manifest.read(other).tokenizer != fingerprint
        except ProgramError:
            continue  # no program
        if differs:
            raise ProgramError(
                f"{path.parent} holds the program {other.stem}, whose tokenizer is another one; export into a "
                "directory of its own"
            )


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A directory to fill; then its files go to path's directory, the manifest last. After an error it is gone."""
    if path.name in ("tokenizer", "tokenizer_config", "special_tokens_map", "config") or path.is_dir():
        raise ProgramError(
            f"--output_path {path} is {'a directory' if path.is_dir() else 'the name of a file beside it'}; give a "
            f"directory and a prefix for the program's files, such as {path.parent / 'bloom'}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with directory_beside(path) as temporary:
            yield temporary
            for name in _files_of_older(path):
                (path.parent / name).unlink(missing_ok=True)
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == f"{path.name}.json"):
                file.replace(path.parent / file.name)
    except OSError as error:
        raise ProgramError(f"{path} cannot be written: {error}") from error
