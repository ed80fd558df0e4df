"""bloomlm from Python: load a model with its tokenizer, complete texts, fine-tune, evaluate.

    import bloomlm

    bloom = bloomlm.load("builtin:tiny")
    for completion in bloom.generate(["Once upon a time"], max_new_tokens=40):
        print(completion.completion)

Texts become token ids here; the modules below work on ids.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bloomlm.adapters.base import adapter_of
from bloomlm.checkpoint.adapters.load import load_adapter
from bloomlm.checkpoint.paddle.importer import ForeignReading
from bloomlm.checkpoint.reader import load_model
from bloomlm.checkpoint.source import resolve_source
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.data.tokenizer_files import read_saved_template
from bloomlm.errors import AdapterError, ConfigError
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.generate import Generation, OnToken
from bloomlm.generation.generate import generate as generate_tokens
from bloomlm.generation.text import Completion, TextGenerator
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.mesh import ALONE, Mesh

if TYPE_CHECKING:
    from bloomlm.evaluation.execution import Display
    from bloomlm.evaluation.report import EvaluationReport
    from bloomlm.runtime.program import Program
    from bloomlm.training.finetune import FinetuneResult

_LOG = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""The precisions a model can be loaded in, by name."""


@dataclass(frozen=True)
class LoadedModel(TextGenerator):
    """A model and the tokenizer it was trained with."""

    model: BloomForCausalLM
    tokenizer: Tokenizer
    mesh: Mesh = ALONE
    """The ranks among which the model is divided; all of them must make every call, and all get its result."""
    name: str = "unnamed"
    """Name or path that it was loaded from."""
    adapter: str | None = None
    """Name or path that its adapter was loaded from; None without one."""

    def _num_copies(self) -> int:
        return self.mesh.degrees.dp

    def _continue(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        *,
        on_token: OnToken | None,
        first_sequence: int,
        prompt_lookup: int,
    ) -> list[Generation]:
        """Continue the prompts on all copies of the model, each of which takes its share."""
        share = -(-len(prompts) // self.mesh.degrees.dp)
        start = share * self.mesh.dp_rank
        results = generate_tokens(
            self.model,
            prompts[start : start + share],
            config,
            on_token=on_token,
            decode_text=self.tokenizer.decode,
            first_sequence=first_sequence + start * config.num_return_sequences,
            prompt_lookup=prompt_lookup,
        )
        return list(chain.from_iterable(self.mesh.gather_copies(results)))


def load(
    name_or_path: str | Path,
    *,
    adapter_path: str | Path | None = None,
    lora_path: str | Path | None = None,
    prefix_path: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    prefix_layout: str | None = None,
    trained_tensor_parallel_degree: int | None = None,
    paddle_tokenization: bool = False,
    mesh: Mesh = ALONE,
) -> LoadedModel:
    """Load a model, its tokenizer and, where given, an adapter, in the files of transformers and PEFT or of PaddleNLP.

    Args:
        name_or_path: `builtin:tiny`, a directory, or a hub name such as `bigscience/bloom-560m`.
        adapter_path: directory or hub name of an adapter of any kind.
        lora_path, prefix_path: like adapter_path, for LoRA or prefix adapters only; give one of the three.
        dtype: precision of the weights, or its name ("float32", "float16", "bfloat16"); None: as on disk.
        device: where to load the weights.
        prefix_layout: for a prefix adapter in PaddleNLP's files: "old" if written before August 2023, else "new".
        trained_tensor_parallel_degree: number of ranks that trained an adapter, for PaddleNLP's files that do not say.
        paddle_tokenization: with vocab.json and merges.txt, split texts into words as PaddleNLP did, not as BLOOM does.
        mesh: the ranks to divide the model among (see bloomlm.parallel), all of which must make this call.

    Raises:
        CheckpointError: files that are missing, damaged or do not belong together; AdapterError: files of an adapter.
        ConfigError: an option or a config.json that cannot be used.
    """
    paths = {"adapter_path": adapter_path, "lora_path": lora_path, "prefix_path": prefix_path}
    given = {name: str(path) for name, path in paths.items() if path is not None}
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} are both given; a model takes one adapter, give one")
    reading = ForeignReading.from_flags(
        prefix_layout=prefix_layout,
        trained_tensor_parallel_degree=trained_tensor_parallel_degree,
        paddle_tokenization=paddle_tokenization,
    )
    if reading.adapter_flags and not given:
        raise ConfigError(f"{reading.adapter_flags[0]} says how to read an adapter; give adapter_path, or leave it out")
    directory = resolve_source(str(name_or_path)).directory
    tokenizer = Tokenizer.from_directory(directory, as_gpt2=reading.tokenization)
    model = load_model(directory, dtype=dtype_of(dtype), device=device, mesh=mesh)
    for name, path in given.items():
        of_adapter = resolve_source(path).directory
        load_adapter(model, of_adapter, reading=reading, mesh=mesh)
        _check_kind(model, path, name)
        tokenizer = tokenizer.with_chat_template(read_saved_template(of_adapter))
    return LoadedModel(model.eval(), tokenizer, mesh, name=str(name_or_path), adapter=next(iter(given.values()), None))


def generate(model: LoadedModel | str | Path, prompts: str | Sequence[str], **options: Any) -> list[Completion]:
    """Complete prompts with a loaded model, or with one that is loaded for this call; see LoadedModel.generate.

    Args:
        model: the result of `load`, or a name or path that it takes.
        prompts: one text or several.
        options: arguments of LoadedModel.generate.
    """
    loaded = model if isinstance(model, LoadedModel) else load(model)
    return loaded.generate(prompts, **options)


def finetune(**options: Any) -> "FinetuneResult":
    """Fine-tune a model on examples, as `bloomlm finetune` does.

    Args:
        options: the flags of `bloomlm finetune` as keyword arguments; see bloomlm.TrainingConfig.

    Raises:
        ConfigError: an unknown option, a missing one, or one that cannot be used.
        DataError, CheckpointError, TrainingError: examples or files that cannot be used, or a run that cannot continue.
    """
    from bloomlm.allocator import keep_freed_memory
    from bloomlm.training.config import TrainingConfig  # loading a model to generate needs no training code
    from bloomlm.training.finetune import finetune as run

    known = {field.name: field for field in fields(TrainingConfig)}
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r} of finetune; known: {', '.join(known)}")
    needed = [name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING]
    missing = [name for name in needed if name not in options]
    if missing:
        raise ConfigError(f"finetune needs {', '.join(missing)}")
    keep_freed_memory()
    return run(TrainingConfig(**options))


def evaluate(
    model: "LoadedModel | Program | str | Path | Callable[[], LoadedModel | Program]",
    *,
    mesh: Mesh | None = None,
    display: "Display | None" = None,
    **options: Any,
) -> "EvaluationReport":
    """Evaluate a model or an exported program under a stated definition, as `bloomlm evaluate` does.

    Args:
        model: the result of `load`, an opened program, or a name or path that `load` takes; or a function that returns
            a model or a program, which is called after the data have been read.
        mesh: the ranks; None: those of the loaded model, or this process alone.
        display: shows notices and progress; None: notices are logged as warnings.
        options: the flags of `bloomlm evaluate` about data, protocol and output as keyword arguments: eval_path,
            protocol, tasks, limit, seq_length, batch_size, output_file and so on; see docs/evaluation.md.

    Returns:
        The report: metrics with their standard errors, and everything that decided them.

    Raises:
        ConfigError: an unknown option, options that do not fit together, or memory that runs out.
        DataError: data that cannot be read; CheckpointError: a model or a report file.
    """
    # loading a model to generate needs no evaluation code
    from bloomlm.evaluation.config import make_config
    from bloomlm.evaluation.evaluate import LoggedNotices
    from bloomlm.evaluation.evaluate import evaluate as run
    from bloomlm.evaluation.execution import Subject

    ranks = mesh or (model.mesh if isinstance(model, LoadedModel) else ALONE)

    def open_subject() -> Subject:
        found = load(model, mesh=ranks) if isinstance(model, (str, Path)) else model
        found = found() if callable(found) else found
        if not isinstance(found, LoadedModel):
            return Subject.of_program(found, ranks)
        return Subject.of_model(found.model, found.tokenizer, name=found.name, adapter=found.adapter, mesh=ranks)

    return run(make_config(options), open_subject, mesh=ranks, display=display or LoggedNotices())


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The precision that DTYPES has under a name; a dtype and None are returned unchanged.

    Raises:
        ConfigError: there is no precision of this name.
    """
    if not isinstance(dtype, str):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it can be {', '.join(DTYPES)}, or None for the precision of the files")
    return DTYPES[dtype]


def _check_kind(model: BloomForCausalLM, path: str, flag: str) -> None:
    adapter = adapter_of(model)
    assert adapter is not None
    if flag not in ("adapter_path", adapter.path_flag):
        raise AdapterError(f"{path} holds a {adapter.kind} adapter; give it as {adapter.path_flag}, not as {flag}")
