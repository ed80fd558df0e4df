"""export_program: a model becomes a program, written in a temporary directory, compared with the model, and moved."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from bloomlm.checkpoint.fingerprint import model_fingerprint
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import BackendMissingError, ProgramError
from bloomlm.export.calibration import calibration_windows
from bloomlm.export.formats import FORMATS
from bloomlm.export.formats.base import ExportFormat, ExportJob, OnStage
from bloomlm.export.parity import TEXTS, Parity, compare, comparison_tokens
from bloomlm.files.atomic import directory_beside
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.runtime.manifest import Manifest, describe_file
from bloomlm.runtime.program import Program
from bloomlm.version import __version__


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """What was written."""

    path: Path
    """Directory and prefix."""
    files: Mapping[str, int]
    """Name -> bytes."""
    is_compiled: bool
    """Whether the program was compiled, for which there must be a compiler."""
    parity: Parity | None
    """The comparison with the model; None where it was not wanted or not possible."""
    not_compared: str | None
    """Why a comparison was not possible: the library that runs the program is missing. None otherwise."""


def export_program(
    model: BloomForCausalLM,
    tokenizer: Tokenizer,
    path: Path,
    *,
    source: str,
    format: str = "pt2",
    dtype: torch.dtype | None = None,
    quantization: str = "none",
    calibration_file: str | None = None,
    max_new_tokens: int = 128,
    verify: bool = True,
    on_stage: OnStage = lambda stage, share: None,
) -> ExportResult:
    """Write a model as a program, its adapter included.

    Args:
        model: in eval mode on the CPU. LoRA is merged, and a prefix becomes the beginning of every cache.
        tokenizer: written beside the program.
        path: directory and prefix, for example inference/bloom; an older program of this name is replaced.
        source: name or path of the model.
        format: a key of export.formats.FORMATS.
        dtype: precision of the matrices; None: the model's, or float32 where the format does not have that.
        quantization: one of export.weights.QUANTIZATIONS that the format has.
        calibration_file: texts by which int4 is rounded (calibration.py); None: every matrix is rounded by itself.
        max_new_tokens: default number of tokens that the program generates.
        verify: compare the program with the model, if its runtime is installed, and refuse it if they differ.
        on_stage: receives the progress.

    Raises:
        ProgramError: the program differs from the model, or cannot be compiled or written.
        ConfigError, CheckpointError: the model cannot be stored in this format, precision or quantisation.
        DataError: the calibration texts cannot be read, or are too short.
    """
    form = FORMATS[format]
    job = ExportJob(
        model=model,
        tokenizer=tokenizer,
        path=path,
        source=source,
        dtype=form.stored_dtype(model, dtype, quantization),
        quantization=quantization,
        max_new_tokens=max_new_tokens,
        on_stage=on_stage,
        calibration=_calibration(form, quantization, calibration_file, tokenizer),
    )
    with _staged(path) as directory:
        manifest = _write_program(job, form, directory)
        parity, not_compared = _compare(job, form, directory, manifest) if verify else (None, None)
    return _result(path, manifest, parity, not_compared)


def _calibration(form: ExportFormat, quantization: str, file: str | None, tokenizer: Tokenizer) -> Tensor | None:
    if file is None:
        return None
    form.check_calibration(quantization)
    return calibration_windows(file, tokenizer)


def _result(path: Path, manifest: Manifest, parity: Parity | None, not_compared: str | None) -> ExportResult:
    sizes = {name: (path.parent / name).stat().st_size for name in (*manifest.files, f"{path.name}.json")}
    is_compiled = manifest.instruction_set is not None
    return ExportResult(path=path, files=sizes, is_compiled=is_compiled, parity=parity, not_compared=not_compared)


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A temporary directory, whose files move to path's directory at the end; after an error it is deleted."""
    if path.name in ("tokenizer", "tokenizer_config", "special_tokens_map", "config") or path.is_dir():
        raise ProgramError(
            f"--output_path {path} is {'a directory' if path.is_dir() else 'the name of a file beside it'}; give a "
            f"directory and a prefix for the program's files, such as {path.parent / 'bloom'}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with directory_beside(path) as temporary:
            yield temporary
            _publish(temporary, path)
    except OSError as error:
        raise ProgramError(f"{path} cannot be written: {error}") from error


def _publish(temporary: Path, path: Path) -> None:
    """Replace the files of an older program, the manifest last. Other files with the same prefix stay."""
    manifest = path.with_name(f"{path.name}.json")
    try:
        older = [manifest.name, *Manifest.read(manifest).files]
    except ProgramError:
        older = []
    for name in older:
        (path.parent / name).unlink(missing_ok=True)
    for file in sorted(temporary.iterdir(), key=lambda file: file.name == manifest.name):
        file.replace(path.parent / file.name)


def _write_program(job: ExportJob, form: ExportFormat, directory: Path) -> Manifest:
    """Write the tokenizer, the format's files and the manifest."""
    fingerprint = _write_tokenizer(job, directory)
    own_fields = form.write(job, directory)
    config = job.model.config
    manifest = Manifest(
        format=form.name,
        bloomlm_version=__version__,
        library_versions={"torch": torch.__version__, "safetensors": safetensors.__version__},
        source=job.source,
        fingerprint=model_fingerprint(job.model),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        num_virtual_tokens=job.model.transformer.num_virtual_tokens,
        dtype=_name(job.dtype),
        quantization=job.quantization,
        special_tokens={name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        tokenizer=fingerprint,
        max_new_tokens=job.max_new_tokens,
        files={file.name: describe_file(file) for file in sorted(directory.glob(f"{job.prefix}.*"))},
        **own_fields,
    )
    _write_manifest(job, directory, manifest)
    return manifest


def _write_tokenizer(job: ExportJob, directory: Path) -> str:
    """Write the tokenizer's files; returns its fingerprint.

    Raises:
        ProgramError: the directory holds a program with another tokenizer, which would be replaced.
    """
    job.tokenizer.save(directory)
    fingerprint = Tokenizer.from_directory(directory).fingerprint
    for other in sorted(job.path.parent.glob("*.json")):
        try:
            differs = other.stem != job.prefix and Manifest.read(other).tokenizer != fingerprint
        except ProgramError:
            continue  # not a program
        if differs:
            raise ProgramError(
                f"{job.path.parent} holds the program {other.stem}, whose tokenizer is another one; export into a "
                "directory of its own"
            )
    return fingerprint


def _write_manifest(job: ExportJob, directory: Path, manifest: Manifest) -> None:
    (directory / f"{job.prefix}.json").write_text(manifest.to_json(), encoding="utf-8")


def _compare(
    job: ExportJob, form: ExportFormat, directory: Path, manifest: Manifest
) -> tuple[Parity | None, str | None]:
    """Compare the program with the model and add the result to its manifest.

    Returns:
        The comparison, or None and why there is none.

    Raises:
        ProgramError: they differ by more than the limits of this kind of program.
    """
    job.on_stage("comparing", 0.0)
    try:
        program = Program(directory / job.prefix)
    except BackendMissingError as error:
        return None, str(error)
    prompts, forced = comparison_tokens(job.tokenizer.encode_batch(TEXTS))
    parity = compare(job.model, program.model, prompts, forced)
    parity.check(_limits(job, form))
    _write_manifest(job, directory, dataclasses.replace(manifest, parity=dataclasses.asdict(parity)))
    return parity, None


def _limits(job: ExportJob, form: ExportFormat) -> str:
    """The key in parity.LIMITS of the program's limits."""
    if job.quantization != "none":
        return job.quantization
    # a model in 16 bits rounds every activation, even if its program does not
    dtype = job.model.transformer.dtype if job.dtype is torch.float32 else job.dtype
    return form.float32_limits if dtype is torch.float32 else _name(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
