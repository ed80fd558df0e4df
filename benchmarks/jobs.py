"""What `make bench-report` measures: one command a job, the table that shows it, and what is asked of it.

To add a benchmark, call `record(rows)` of common.py at the end of its script and add a row to JOBS; its table stands in
docs/benchmarks.md between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import importlib.util
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import counted

TEXTS = Path(os.environ.get("BLOOMLM_BENCH_TEXTS", Path(__file__).parents[2] / "shared" / "data"))
"""Where the texts lie that commands name: lambada_test.jsonl, wikitext-2.valid.tokens, wikitext-2.test.tokens."""
PIP = {"lm_eval": "lm-eval", "llama_cpp": "llama-cpp-python", "optimum-cli": "optimum-intel"}
"""Names of packages, where they differ from those that are imported."""


@dataclass(frozen=True)
class Bound:
    """What is asked of a row, or, with a peer, of the comparison with the peer's row."""

    row: str
    peer: str | None
    key: str
    least: float | None = None
    most: float | None = None

    def holds(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def __str__(self) -> str:
        return f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"


@dataclass(frozen=True)
class Job:
    """One command.

    Args:
        name: of the file of its results.
        table: the table that shows it.
        title: what its rows are, beside those of other jobs in the same table.
        command: a script of this folder with its arguments.
        pairs: rows that are compared, ours and the peer's.
        needs: packages without which it cannot run, or `cuda`.
        bounds: what is asked.
    """

    name: str
    table: str
    title: str
    command: str
    pairs: tuple[tuple[str, str], ...] = ()
    needs: tuple[str, ...] = ()
    bounds: tuple[Bound, ...] = ()

    @property
    def script(self) -> str:
        return self.command.split()[0]

    @property
    def on_gpu(self) -> bool:
        return "cuda" in self.needs

    def missing(self) -> list[str]:
        """What it needs and does not find: what to type, or which file."""
        import torch

        packages = [name for name in self.needs if name != "cuda" and importlib.util.find_spec(name) is None]
        found = [f"pip install {' '.join(PIP.get(name, name) for name in packages)}"] if packages else []
        if self.on_gpu and not torch.cuda.is_available():
            found.append("a GPU")
        texts = [word for word in shlex.split(self.command) if self._is_text(word) and not (TEXTS / word).exists()]
        return [*found, *(f"{text} in {TEXTS} (BLOOMLM_BENCH_TEXTS)" for text in texts)]

    def words(self, folder: Path) -> list[str]:
        """The command with the paths of its script and of texts."""
        script, *rest = shlex.split(self.command)
        return [str(folder / script), *(str(TEXTS / word) if self._is_text(word) else word for word in rest)]

    @staticmethod
    def _is_text(word: str) -> bool:
        return word.endswith((".jsonl", ".tokens"))


PEERS = ("transformers", "trl", "llama.cpp", "vllm", "openvino", "lm_eval", "naive", "datasets")
"""Beginnings of sides that are programs of others."""
CALIBRATED = ("bloomlm int4, calibrated", "llama.cpp Q4_0, its own")
OURS = (("bloomlm", "transformers"),)
TRAINING = ("transformers", "peft")
STEP, GPU = "train_step.py --tuning", "--device cuda --batch_size 16 --steps 12 --warm_up 5 --rounds 1"
IN_BF16 = "--sides bloomlm bloomlm-O1 bloomlm-O2 transformers-O1"
O1 = (("bloomlm-O1", "transformers-O1"),)
TURNS = "turns.py --sides"
GENERATE, SERVE = "generate.py --new_tokens 32 --rounds 2 --sides", "serve.py --rounds 1 --parts"
F32, INT8, INT4 = ("pt2", "llama.cpp-F32"), ("pt2-int8", "llama.cpp-Q8_0"), ("pt2-int4", "llama.cpp-Q4_0")
BF16, EAGER_BF16 = ("pt2-bf16", "pt2"), ("eager-bf16", "eager")
OPENVINO, OPENVINO_INT8, EAGER = ("pt2", "openvino-fp32"), ("pt2-int8", "openvino-int8"), ("eager", "pt2")


def faster(pair: tuple[str, str], *least: float, keys: Sequence[str] = ("decode_1", "decode_8", "prefill_512")):
    """Bounds of a comparison, key by key."""
    return tuple(Bound(*pair, key, least=bound) for key, bound in zip(keys, least, strict=False))


def in_bf16(tuning: str, title: str, flags: str) -> Job:
    """Training in bf16 beside fp32 and beside transformers in bf16."""
    pairs = (("bloomlm-O1", "bloomlm"), ("bloomlm-O2", "bloomlm"), *O1)
    bounds = (
        Bound(*pairs[0], "tokens_per_second", least=1.6),
        Bound(*pairs[0], "peak_memory_gb", most=1.0),
        Bound(*pairs[1], "tokens_per_second", least=1.8),
    )
    command = f"{STEP} {tuning} {IN_BF16} {flags}"
    return Job(f"train_step-{tuning}-bf16", "train_step_half", title, command, pairs, TRAINING, bounds)


def streams(pair: tuple[str, str], *least: float) -> tuple[Bound, ...]:
    """Bounds of servers with 1, 4, 8 and 16 streams."""
    names = [[f"{counted(count, 'stream')}, {side}" for side in pair] for count in (1, 4, 8, 16)]
    bounds = zip(names, least, strict=True)
    return tuple(Bound(row, peer, "tokens_per_second", least=bound) for (row, peer), bound in bounds)


def beside_trl(name: str, title: str) -> Job:
    bounds = (
        Bound("bloomlm", "trl", "tokens_per_second", least=3.0),
        Bound("bloomlm", "trl", "peak_memory_gb", most=0.6),
    )
    command = f"preference.py --objective {name}"
    return Job(f"preference-{name}", "preference", title, command, (("bloomlm", "trl"),), ("trl", *TRAINING), bounds)


def evaluation(name: str, flags: str, *needs: str) -> Job:
    pair = ("bloomlm", "lm_eval" if needs else "naive")
    return Job(f"evaluate-{name}", "evaluate", name, f"evaluate.py --task {name} {flags}", (pair,), (*needs, *TRAINING))


JOBS = (
    Job(
        "train_step-full",
        "train_step",
        "full",
        f"{STEP} full --steps 3",
        OURS,
        TRAINING,
        (Bound(*OURS[0], "peak_memory_gb", most=0.6), Bound("bloomlm", None, "of_peak", least=0.7)),
    ),
    Job(
        "train_step-full-clipped",
        "train_step",
        "full, clipped",
        f"{STEP} full --max_grad_norm 1 --steps 3 --rounds 1",
        OURS,
        TRAINING,
    ),
    Job(
        "train_step-lora",
        "train_step",
        "LoRA r 8",
        f"{STEP} lora",
        OURS,
        TRAINING,
        (Bound("bloomlm", None, "of_peak", least=0.68),),
    ),
    Job("train_step-prefix", "train_step", "prefix, 16 tokens", f"{STEP} prefix", OURS, TRAINING),
    in_bf16("full", "full", "--steps 3 --rounds 1"),
    in_bf16("lora", "LoRA r 8", "--steps 4 --rounds 1"),
    Job(
        "train_step-nf4",
        "quantised_base",
        "nf4",
        f"{STEP} lora --base_quantization nf4 --steps 3 --rounds 1",
        OURS,
        TRAINING,
    ),
    Job(
        "train_step-int8",
        "quantised_base",
        "int8",
        f"{STEP} lora --base_quantization int8 --steps 3 --rounds 1",
        OURS,
        TRAINING,
    ),
    beside_trl("dpo", "DPO"),
    beside_trl("sft", "SFT"),
    Job("decode", "decode", "", "decode.py --rounds 2 --repeats 2", OURS, TRAINING),
    Job(
        "generate-int8",
        "generate",
        "",
        f"{GENERATE} pt2-int8,llama.cpp-Q8_0,openvino-int8,ctranslate2-int8",
        (INT8, OPENVINO_INT8),
        bounds=(*faster(INT8, 1.1, 1.1), *faster(OPENVINO_INT8, 1.1, 1.1, 1.0)),
    ),
    Job(
        "generate-int4",
        "generate",
        "",
        f"{GENERATE} pt2-int4,llama.cpp-Q4_0",
        (INT4,),
        bounds=faster(INT4, 1.1, 1.0, 1.0),
    ),
    Job(
        "generate-fp32",
        "generate",
        "",
        f"{GENERATE} pt2,eager,llama.cpp-F32,openvino-fp32",
        (F32, OPENVINO, EAGER),
        bounds=(*faster(F32, 1.0), *faster(EAGER, 0.95, 0.95)),
    ),
    Job(
        "generate-bf16",
        "generate",
        "",
        f"{GENERATE} pt2-bf16,pt2,eager-bf16,eager",
        (BF16, EAGER_BF16),
        bounds=(*faster(BF16, 1.7, 1.7, 1.7), *faster(EAGER_BF16, 1.7, 1.7, 1.7)),
    ),
    Job(
        "generate-ours",
        "generate_ours",
        "",
        f"{GENERATE} pt2,eager,pt2-int8,pt2-int4",
        (EAGER, ("pt2-int8", "pt2"), ("pt2-int4", "pt2"), ("pt2-int4", "pt2-int8")),
        bounds=faster(EAGER, 0.95, 0.95),
    ),
    Job(
        "turns-int8",
        "turns",
        "",
        f"{TURNS} pt2-int8,llama.cpp-Q8_0,openvino-int8",
        (INT8, OPENVINO_INT8),
        ("llama_cpp", "openvino"),
        bounds=(*faster(INT8, 1.1, 1.1), *faster(OPENVINO_INT8, 1.1, 1.1)),
    ),
    Job("turns-int4", "turns", "", f"{TURNS} pt2-int4,llama.cpp-Q4_0", (INT4,), ("llama_cpp",), faster(INT4, 1.1, 1.0)),
    Job(
        "turns-fp32",
        "turns",
        "",
        f"{TURNS} pt2,eager,llama.cpp-F32",
        (F32, EAGER),
        ("llama_cpp",),
        (*faster(F32, 1.0), *faster(EAGER, 0.95, 0.95)),
    ),
    Job(
        "turns-bf16",
        "turns",
        "",
        f"{TURNS} pt2-bf16,pt2,eager-bf16,eager",
        (BF16, EAGER_BF16),
        bounds=(*faster(BF16, 1.7, 1.7), *faster(EAGER_BF16, 1.7, 1.7)),
    ),
    Job("generate-others", "generate", "", f"{GENERATE} transformers,ctranslate2-float32,onnxruntime,pt2 --rounds 1"),
    Job(
        "serve-int8",
        "serve",
        "",
        f"{SERVE} rates --sides pt2-int8,llama.cpp-Q8_0",
        (INT8,),
        bounds=streams(INT8, 1.0, 1.2, 1.2, 1.2),
    ),
    Job(
        "serve-fp32",
        "serve",
        "",
        f"{SERVE} rates --sides pt2,llama.cpp-F32",
        (F32,),
        bounds=streams(F32, 1.0, 1.2, 1.2, 1.2),
    ),
    Job("serve-transformers", "serve", "", f"{SERVE} rates --sides transformers --streams 1,4"),
    Job(
        "serve-vllm",
        "serve",
        "2 blocks",
        f"{SERVE} rates --layers 2 --sides pt2,vllm",
        (("pt2", "vllm"),),
    ),
    Job(
        "serve-http_overhead",
        "serve_http",
        "",
        "serve.py --parts http_overhead --sides pt2-int8 --streams 8 --rounds 3",
        bounds=(Bound("8 streams, pt2-int8", None, "http_over_session", least=0.95),),
    ),
    Job("serve-long_prompt", "serve_long", "", f"{SERVE} long_prompt --sides pt2-int8"),
    Job(
        "serve-prefix",
        "serve_prefix",
        "",
        f"{SERVE} prefix --sides pt2-int8",
        bounds=(Bound("512 common tokens, pt2-int8", None, "times_sooner", least=5.0),),
    ),
    Job("serve-lookup", "serve_lookup", "", f"{SERVE} lookup --sides pt2-int8"),
    Job(
        "serve-lora",
        "serve_lora",
        "",
        "serve.py --rounds 2 --parts lora --sides eager --streams 1,8 --lora_layers all",
        bounds=tuple(Bound(f"{counted(n, 'stream')}, eager", None, "mixed_over_base", least=0.85) for n in (1, 8)),
    ),
    Job(
        "trim-pt2",
        "trim",
        "",
        "trim.py --runtimes pt2,pt2-int8,llama.cpp-Q8_0 --vocabularies 250880,46145 --rounds 2 --new_tokens 48",
    ),
    Job("trim-eager", "trim", "", "trim.py --runtimes eager,llama.cpp-F32,train --rounds 2 --new_tokens 48 --steps 2"),
    Job(
        "quantisation",
        "quantisation",
        "",
        "quantisation.py wikitext-2.valid.tokens wikitext-2.test.tokens",
        (CALIBRATED,),
        ("gguf", "llama_cpp"),
        (Bound(*CALIBRATED, "error", most=0.5),),
    ),
    Job("load", "load", "", "load.py", OURS, TRAINING),
    Job("convert-1b7", "convert", "1b7", "convert.py --model 1b7 --rounds 3"),
    Job("convert-176b", "convert", "176b, 2 layers, 8 ranks", "convert.py --model 176b-2-layers --ranks 8"),
    Job("growth", "growth", "", "growth.py --steps 2 --picture docs/images/growth.png", OURS, TRAINING),
    Job("long_context", "long_context", "", "long_context.py --picture docs/images/long_context.png", OURS, TRAINING),
    Job("recompute", "recompute", "", "recompute.py", (("made again", "kept"),)),
    evaluation("lambada", "--file lambada_test.jsonl --limit 64", "lm_eval"),
    evaluation("wikitext", "--file wikitext-2.test.tokens --limit 2", "lm_eval"),
    evaluation("sliding", "--file wikitext-2.valid.tokens --limit 32"),
    Job("corpus", "corpus", "", "corpus.py --text wikitext-2.valid.tokens", (("bloomlm", "datasets"),), ("datasets",)),
    Job(
        "tensor_parallel",
        "tensor_parallel",
        "",
        "tensor_parallel.py",
        (("tp 2", "tp 1"),),
        bounds=(Bound("tp 2", "tp 1", "seconds", least=1.7), Bound("tp 2", "tp 1", "state_gb", most=0.55)),
    ),
    Job("communication", "communication", "", "communication.py"),
    Job(
        "first_token",
        "first_token",
        "",
        "first_token.py",
        bounds=tuple(Bound(side, None, "first_token_seconds", most=1.0) for side in ("pt2-int8", "pt2-int4", "pt2")),
    ),
    Job("kernels", "kernels", "", "kernels.py --rows 1,8 --widths 1024"),
    Job("adapters", "adapters", "", "adapters.py"),
    Job("soak", "soak", "", "soak.py --minutes 10"),
    Job("gpu-full", "gpu", "full", f"{STEP} full --sides transformers-O1 bloomlm-O1 {GPU}", O1, (*TRAINING, "cuda")),
    Job(
        "gpu-lora", "gpu", "LoRA r 8", f"{STEP} lora --sides transformers-O1 bloomlm-O1 {GPU}", O1, (*TRAINING, "cuda")
    ),
    Job(
        "gpu-decode",
        "gpu_decode",
        "",
        "decode.py --device cuda --dtype bfloat16 --new_tokens 64 --repeats 2 --rounds 1",
        OURS,
        (*TRAINING, "cuda"),
    ),
)
