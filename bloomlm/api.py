"""bloomlm from Python: load a model with its tokenizer, complete texts, fine-tune.

    import bloomlm

    bloom = bloomlm.load("builtin:tiny")
    for completion in bloom.generate(["Once upon a time"], max_new_tokens=40):
        print(completion.completion)

Texts become ids here; everything below works on ids.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bloomlm.adapters.apply import adapter_config
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint.adapter import load_adapter
from bloomlm.checkpoint.paddle.prefix import PrefixLayout
from bloomlm.checkpoint.reader import load_model
from bloomlm.checkpoint.source import resolve_source
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import AdapterError, ConfigError, GenerationError
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.decode import FinishReason, Generation, OnToken
from bloomlm.generation.decode import generate as generate_tokens
from bloomlm.model.bloom import BloomForCausalLM

if TYPE_CHECKING:
    from bloomlm.training.finetune import FinetuneResult

_LOG = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""The precisions a model can be loaded in, by name."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One continuation of one prompt."""

    prompt: str
    """The whole prompt, as it was given."""
    completion: str
    """The generated text, without special tokens, cut before a stop text."""
    finish_reason: FinishReason
    """eos: the model ended it; stop: a stop text occurred; length: max_new_tokens were generated."""
    tokens: list[int]
    """The generated ids, with `</s>` or the stop text's tokens at the end where there are any."""


@dataclass(frozen=True)
class LoadedModel:
    """A model and the tokenizer it was trained with."""

    model: BloomForCausalLM
    tokenizer: Tokenizer

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        batch_size: int = 8,
        src_length: int | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Complete prompts.

        Args:
            prompts: one text or several.
            batch_size: prompts computed at once; it changes the speed only.
            src_length: most tokens of a prompt; the end of a longer one is dropped, as in training. None: no cut.
            options: decode_strategy ("greedy", "sampling", "beam_search") and what acts under it: max_new_tokens,
                min_new_tokens, repetition_penalty, no_repeat_ngram_size, stop (texts), num_return_sequences;
                temperature, top_k, top_p, seed; num_beams, length_penalty. See bloomlm.GenerationConfig.

        Returns:
            num_return_sequences completions of the first prompt, then of the second, and so on.

        Raises:
            GenerationError: an empty prompt, an unknown option, or one without effect.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        config = GenerationConfig.from_options(**options)
        return list(self.completions(texts, config, batch_size=batch_size, src_length=src_length))

    def completions(
        self,
        prompts: Sequence[str],
        config: GenerationConfig,
        *,
        batch_size: int = 8,
        src_length: int | None = None,
        num_done: int = 0,
        on_token: OnToken | None = None,
    ) -> Iterator[Completion]:
        """Complete prompts batch by batch, each completion coming as soon as its batch is done.

        Args:
            prompts: all prompts of the run.
            config: how to continue them.
            batch_size: prompts computed at once.
            src_length: most tokens of a prompt; the end of a longer one is dropped. None: no cut.
            num_done: prompts to leave out at the beginning; the others' samples stay what they would have been.
            on_token: called with (index among all completions of the run, id) for each token as it comes.

        Raises:
            GenerationError: an empty prompt, or a batch or length below 1.
        """
        if batch_size < 1:
            raise GenerationError(f"batch_size is {batch_size}; it must be an integer from 1")
        encoded = self._encode(prompts, src_length)
        for start in range(num_done, len(prompts), batch_size):
            first = start * config.num_return_sequences
            results = generate_tokens(
                self.model,
                encoded[start : start + batch_size],
                config,
                on_token=_shifted(on_token, first),
                decode_text=self.tokenizer.decode,
                first_sequence=first,
            )
            for place, result in enumerate(results):
                yield self._completion(prompts[start + place // config.num_return_sequences], result, config.stop)

    def _encode(self, prompts: Sequence[str], src_length: int | None) -> list[list[int]]:
        if src_length is not None and src_length < 1:
            raise GenerationError(f"src_length is {src_length}; it must be an integer from 1")
        encoded = self.tokenizer.encode_batch(prompts)
        for number, tokens in enumerate(encoded, start=1):
            if not tokens:
                raise GenerationError(
                    f"prompt {number} of {len(prompts)} is empty; a continuation needs at least one token. "
                    "To write from nothing, give '<s>', BLOOM's first token"
                )
        longest = max(map(len, encoded), default=0)
        if src_length is None or longest <= src_length:
            return encoded
        num_cut = sum(len(tokens) > src_length for tokens in encoded)
        _LOG.warning(
            "%d of %d prompts are longer than src_length %d tokens (the longest has %d); their ends were dropped, as "
            "in training. A larger src_length keeps them whole",
            num_cut,
            len(encoded),
            src_length,
            longest,
        )
        return [tokens[:src_length] for tokens in encoded]

    def _completion(self, prompt: str, result: Generation, stop: Sequence[str]) -> Completion:
        text = self.tokenizer.decode(result.tokens)
        if result.finish_reason == "stop":
            text = text[: min(text.index(end) for end in stop if end in text)]
        return Completion(prompt=prompt, completion=text, finish_reason=result.finish_reason, tokens=result.tokens)


def load(
    name_or_path: str | Path,
    *,
    lora_path: str | Path | None = None,
    prefix_path: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    prefix_layout: PrefixLayout | str | None = None,
    trained_tensor_parallel_degree: int | None = None,
    paddle_tokenization: bool = False,
) -> LoadedModel:
    """Load a model, its tokenizer and, where given, an adapter, in the files of transformers and PEFT or of PaddleNLP.

    Args:
        name_or_path: `builtin:tiny`, a directory, or a hub name such as `bigscience/bloom-560m`.
        lora_path: directory or hub name of a LoRA adapter.
        prefix_path: the same of a prefix adapter; not together with lora_path.
        dtype: precision of the weights, or its name ("float32", "float16", "bfloat16"); None: as on disk.
        device: where they go.
        prefix_layout: of a prefix adapter in PaddleNLP's files ("old" or "new"), where they do not tell it.
        trained_tensor_parallel_degree: ranks that trained an adapter in PaddleNLP's files, where they do not tell it.
        paddle_tokenization: with a vocab.json and merges.txt, cut texts into words as PaddleNLP did, not as BLOOM.

    Raises:
        CheckpointError: files are missing, damaged or do not fit together; AdapterError: those of the adapter.
        ConfigError: an option, or the model's config.json, cannot be used.
    """
    if lora_path is not None and prefix_path is not None:
        raise ConfigError(f"lora_path {lora_path} and prefix_path {prefix_path}: a model takes one adapter; give one")
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; it can be {', '.join(DTYPES)}, or None for that of the files")
        dtype = DTYPES[dtype]
    directory = resolve_source(str(name_or_path)).directory
    tokenizer = Tokenizer.from_directory(directory, paddle_tokenization=paddle_tokenization)
    model = load_model(directory, dtype=dtype, device=device)
    for path, kind in ((lora_path, LoraConfig), (prefix_path, PrefixConfig)):
        if path is not None:
            load_adapter(
                model,
                resolve_source(str(path)).directory,
                prefix_layout=None if prefix_layout is None else PrefixLayout(prefix_layout),
                trained_tensor_parallel_degree=trained_tensor_parallel_degree,
            )
            _check_kind(model, path, kind)
    return LoadedModel(model.eval(), tokenizer)


def generate(model: LoadedModel | str | Path, prompts: str | Sequence[str], **options: Any) -> list[Completion]:
    """Complete prompts with a loaded model, or with one loaded for this call.

    Args:
        model: what `load` gave, or a name or path that it takes.
        prompts: one text or several.
        options: those of LoadedModel.generate.

    Returns:
        num_return_sequences completions of the first prompt, then of the second, and so on.

    Raises:
        GenerationError: an empty prompt, an unknown option, or one without effect.
    """
    loaded = model if isinstance(model, LoadedModel) else load(model)
    return loaded.generate(prompts, **options)


def finetune(**options: Any) -> "FinetuneResult":
    """Fine-tune a model on examples, as `bloomlm finetune` does.

    Args:
        options: the flags of `bloomlm finetune` as keywords, see bloomlm.TrainingConfig.

    Raises:
        ConfigError: an unknown option, a missing one, or one that cannot be used.
        DataError, CheckpointError, TrainingError: as the run goes.
    """
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
    return run(TrainingConfig(**options))


def _check_kind(model: BloomForCausalLM, path: str | Path, expected: type[LoraConfig] | type[PrefixConfig]) -> None:
    if not isinstance(adapter_config(model), expected):
        wanted, other = ("LoRA", "prefix_path") if expected is LoraConfig else ("prefix", "lora_path")
        raise AdapterError(f"{path} holds no {wanted} adapter; give it as {other}")


def _shifted(on_token: OnToken | None, first: int) -> OnToken | None:
    return None if on_token is None else lambda index, token: on_token(first + index, token)
