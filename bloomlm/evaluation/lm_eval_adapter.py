"""BLOOM as a model of lm-eval (lm-evaluation-harness), for any of its tasks.

    lm_eval --model bloomlm --model_args pretrained=bigscience/bloom-560m --tasks arc_easy

Releases of lm-eval that support plugins find the model by its entry point (group `lm_eval.models`). Releases up to
0.4.13 do not; with those, `python -m bloomlm.evaluation.lm_eval_main` takes the same arguments. `bloomlm evaluate
--tasks` works with all releases.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bloomlm.checkpoint.adapters.load import load_adapter
from bloomlm.checkpoint.reader import load_model
from bloomlm.checkpoint.source import resolve_source
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError
from bloomlm.evaluation.protocols.lm_eval import SEQ_LENGTH, encode_pairs, rolling_windows
from bloomlm.evaluation.scoring.batches import generate_batches, join_shares
from bloomlm.evaluation.scoring.scorers import window_scorer
from bloomlm.evaluation.scoring.windows import Window, WindowScore, continuation_windows
from bloomlm.generation.config import GenerationConfig, Greedy, Sampling, Strategy
from bloomlm.generation.language_model import LanguageModel
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.launch import find_device
from bloomlm.parallel.mesh import ALONE, Mesh

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as _error:
    raise ConfigError("lm-eval's tasks need: pip install 'bloomlm[lm_eval]'") from _error

_LOG = logging.getLogger(__name__)

MAX_NEW_TOKENS = 256
"""Length of a continuation where the task does not give one."""
_DEFAULT_BATCH_SIZE = 8
_TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("bloomlm")
class BloomLM(LM):  # type: ignore[misc, unused-ignore]
    """A BLOOM that answers lm-eval's three kinds of requests.

    Args:
        pretrained: builtin:NAME, a directory or a hub name; or a loaded model or program, together with its tokenizer.
        tokenizer: the tokenizer of a loaded model or program.
        adapter_path, lora_path, prefix_path: directory or hub name of an adapter; one of the three.
        dtype: name of the weights' precision; None or "auto": as on disk.
        device: where to compute. None, or a GPU that does not exist: a GPU if there is one, else the CPU.
        batch_size: sequences of max_length at once ("auto": 8); halved when memory runs out.
        max_batch_size: not used; lm-eval always passes it.
        max_length: maximum tokens that the model sees at once.
        mesh: the ranks of a loaded model. All of them make the same requests, and all get all results.
    """

    def __init__(
        self,
        pretrained: str | LanguageModel,
        *,
        tokenizer: Tokenizer | None = None,
        adapter_path: str | None = None,
        lora_path: str | None = None,
        prefix_path: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int = SEQ_LENGTH,
        mesh: Mesh = ALONE,
    ) -> None:
        super().__init__()
        self._model: LanguageModel
        if not isinstance(pretrained, str):
            assert tokenizer is not None, "a loaded model needs its tokenizer"
            self._model, self._tokenizer = pretrained, tokenizer
        else:
            adapters = [path for path in (adapter_path, lora_path, prefix_path) if path]
            if len(adapters) > 1:
                raise ConfigError(f"{' and '.join(adapters)}: a model takes one adapter; give one")
            self._model, self._tokenizer = _load(pretrained, next(iter(adapters), None), dtype, device)
        self._mesh = mesh
        self._max_length = int(max_length)
        self._batch_size = _batch_size(batch_size)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding generates it."""
        pairs = [request.args for request in requests]
        encoded = encode_pairs(pairs, self._tokenizer)
        for number, (_, continuation) in enumerate(encoded):
            if not continuation:
                raise ConfigError(f"request {number}: the continuation {pairs[number][1]!r} has no tokens")
        windows, num_cut = continuation_windows(encoded, self._max_length)
        if num_cut:
            _LOG.warning(
                "%d of %d contexts are longer than max_length %d; their beginnings were cut off",
                num_cut,
                len(windows),
                self._max_length,
            )
        results = [(score.log_prob, score.is_greedy) for score in self._score(windows)]
        for pair, result in zip(pairs, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of each text, every token scored once in disjoint windows."""
        texts = [request.args[0] for request in requests]
        pieces = [
            rolling_windows(ids, self._tokenizer.bos_token_id, self._max_length)
            for ids in self._tokenizer.encode_batch(texts)
        ]
        scores = iter(self._score([window for piece in pieces for window in piece]))
        results = [sum(next(scores).log_prob for _ in piece) for piece in pieces]
        for text, result in zip(texts, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), result)
        return results

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """A continuation of each context, up to a stop text, `</s>` or a number of tokens."""
        own: dict[int, str] = {}
        by_options: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_options.setdefault(repr(request.args[1]), []).append(number)
        encoded = self._tokenizer.encode_batch([request.args[0] for request in requests])
        with self._progress("generating", len(requests)) as advance:
            for numbers in by_options.values():
                config = generation_config(requests[numbers[0]].args[1])
                room = self._max_length - config.max_new_tokens
                if room < 1:
                    raise ConfigError(
                        f"max_gen_toks {config.max_new_tokens} leaves no room for a context in max_length "
                        f"{self._max_length}; give a larger one: --model_args pretrained=...,max_length=4096"
                    )
                prompts = {number: encoded[number][-room:] or [self._tokenizer.bos_token_id] for number in numbers}
                batches = generate_batches(
                    self._model,
                    prompts,
                    config,
                    batch_size=self._batch_size,
                    decode_text=self._tokenizer.decode,
                    mesh=self._mesh,
                )
                for batch in batches:
                    texts = {number: self._tokenizer.decode(result.tokens) for number, result in batch.items()}
                    own |= {number: self._cut(text, config.stop) for number, text in texts.items()}
                    advance(len(batch))
        results = join_shares(own, self._mesh)
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, results[number])
        return [results[number] for number in range(len(requests))]

    @staticmethod
    def _cut(text: str, stop: Sequence[str]) -> str:
        for end in stop:
            text = text.split(end)[0]
        return text

    def _score(self, windows: Sequence[Window]) -> list[WindowScore]:
        scorer = window_scorer(self._model, max_batch_tokens=self._batch_size * self._max_length, mesh=self._mesh)
        with self._progress("scoring", len(windows)) as advance:
            return scorer.score_all(windows, advance)

    @contextmanager
    def _progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a progress bar on a terminal; yields a function that advances it."""
        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, disable=not (console.is_terminal and self._mesh.is_main)) as progress:
            bar = progress.add_task(what, total=total)
            # the other copies have finished about as many
            yield lambda num_done: progress.advance(bar, num_done * self._mesh.degrees.dp)


def generation_config(options: dict[str, Any]) -> GenerationConfig:
    """The generation config for a task's generation_kwargs.

    Args:
        options: until, max_gen_toks (or one of its other names), do_sample, temperature, top_k, top_p,
            repetition_penalty, num_beams at 1.

    Raises:
        ConfigError: an option that is not supported.
    """
    rest = dict(options)
    stop = rest.pop("until", None) or []
    limits = [int(rest.pop(name)) for name in _TOKEN_LIMITS if name in rest]
    temperature = float(rest.pop("temperature", 0.0) or 0.0)
    do_sample = rest.pop("do_sample", None)
    top_k, top_p = int(rest.pop("top_k", 0) or 0), float(rest.pop("top_p", 1.0) or 1.0)
    penalty = float(rest.pop("repetition_penalty", 1.0))
    if rest.pop("num_beams", 1) != 1 or rest:
        raise ConfigError(
            f"generation_kwargs {options}: expected until, {_TOKEN_LIMITS[0]}, do_sample, temperature, "
            "top_k, top_p, repetition_penalty"
        )
    strategy: Strategy = Greedy()
    if do_sample or (do_sample is None and temperature > 0):
        strategy = Sampling(temperature=temperature or 1.0, top_k=top_k, top_p=top_p)
    return GenerationConfig(
        strategy=strategy,
        max_new_tokens=limits[0] if limits else MAX_NEW_TOKENS,
        repetition_penalty=penalty,
        stop=tuple([stop] if isinstance(stop, str) else [text for text in stop if text]),
    )


def _batch_size(value: int | str | None) -> int:
    text = str(value or _DEFAULT_BATCH_SIZE)
    if text.split(":")[0] == "auto":
        return _DEFAULT_BATCH_SIZE
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"batch_size {value}: expected a whole number from 1, or auto")
    return int(text)


def _load(name: str, adapter: str | None, dtype: str | None, device: str | None) -> tuple[BloomForCausalLM, Tokenizer]:
    directory: Path = resolve_source(name).directory
    precision = None if dtype in (None, "auto") else getattr(torch, str(dtype), None)
    if dtype not in (None, "auto") and not isinstance(precision, torch.dtype):
        raise ConfigError(f"dtype {dtype}: expected float32, float16, bfloat16 or auto")
    # lm-eval names a GPU by default, also where there is none
    place = find_device(device if torch.cuda.is_available() else None)
    model = load_model(directory, dtype=precision, device=place)
    if adapter is not None:
        load_adapter(model, resolve_source(adapter).directory)
    return model.eval(), Tokenizer.from_directory(directory)
