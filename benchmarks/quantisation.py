"""What int8 and int4 cost: matrices of programs and llama.cpp's files of one model, compared with the model on text.

    python benchmarks/quantisation.py wikitext-2.valid.tokens wikitext-2.test.tokens

The first text calibrates int4 (`bloomlm export --calibration_file`), on the second all are measured, in windows of 256
tokens. `error` is that of the logits, ||a - b|| / ||b|| after subtracting their mean over the vocabulary from b;
`divergence` is Kullback and Leibler's from the model, in nats a token; `change`, of the perplexity. `bits` are those of
all tensors a weight. Our rows are the model with the matrices of a pt2 program; compiled programs also round
activations, by a hundredth of the error of int4. The gguf files are of `bloomlm export` except for the rows "its own",
which llama.cpp's quantiser makes: Q4_0 throughout ("pure"), and Q4_K_M, which has matrices of more bits too.
"""

import argparse
import copy
import ctypes
import dataclasses
import functools
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import machine, record

from bloomlm.api import LoadedModel, load
from bloomlm.export.calibration import calibrated_tensors, calibration_windows
from bloomlm.export.graph import look_up
from bloomlm.export.program import export_program
from bloomlm.export.weight_formats import SUFFIXES, Int4, Int8, WeightFormat
from bloomlm.export.weights import named_tensors, stored_name
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.runtime import Program
from bloomlm.runtime.manifest import Manifest, describe_file

WINDOW_TOKENS = 256
OURS = {"bloomlm int8": Int8(), "bloomlm int4": Int4(), "bloomlm int4, calibrated": Int4()}
GGUF = {"llama.cpp Q8_0": "int8", "llama.cpp Q4_0": "int4"}
THEIRS = {"llama.cpp Q4_0, its own": ("MOSTLY_Q4_0", True), "llama.cpp Q4_K_M, its own": ("MOSTLY_Q4_K_M", False)}


@functools.cache  # llama.cpp calls it later, too, so it must stay
def silence_llama() -> Any:
    """Let llama.cpp print nothing."""
    from llama_cpp import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda *message: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    return silence


def llama_quantised(source: Path, path: Path, kind: str, pure: bool) -> None:
    """A program whose gguf file llama.cpp's quantiser makes of the one in float32."""
    from llama_cpp import llama_cpp

    silence_llama()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.pure = getattr(llama_cpp, f"LLAMA_FTYPE_{kind}"), pure
    files = [os.fsencode(one.with_suffix(".gguf")) for one in (source, path)]
    assert llama_cpp.llama_model_quantize(*files, ctypes.byref(parameters)) == 0
    made = path.with_suffix(".gguf")
    manifest = Manifest.read(source.with_suffix(".json"))
    changed = dataclasses.replace(manifest, files={made.name: describe_file(made)})
    path.with_suffix(".json").write_text(changed.to_json(), encoding="utf-8")


def gguf_bytes(path: Path) -> int:
    """Bytes of the tensors of a gguf file."""
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(path.with_suffix(".gguf")).tensors)


def rounded(model: BloomForCausalLM, weights: WeightFormat, tensors: dict[str, torch.Tensor]) -> BloomForCausalLM:
    """The model with the tensors of a program."""
    changed = copy.deepcopy(model)
    for name, parameter in changed.named_parameters():
        names = {suffix: stored_name(name, suffix) for suffix in SUFFIXES}
        parts = {suffix: tensors[full] for suffix, full in names.items() if full in tensors}
        parameter.data = weights.decode(parts) if parameter.dim() == 2 else tensors[stored_name(name)].float()
    # the head keeps the rows above, while those that are looked up may have more bits
    changed.transformer.word_embeddings.forward = functools.partial(look_up, weights=tensors, format=weights)
    return changed


@torch.inference_mode()
def measured(model: BloomForCausalLM, other: Any, windows: torch.Tensor, num_bytes: int) -> dict[str, float]:
    """Another model, or a program's, beside the model, at every token of the windows."""
    error = size = divergence = 0.0
    losses = [0.0, 0.0]
    for window in windows:
        read = window[:-1].tolist()
        sides = [side.open_rows(1, len(read)) for side in (model, other)]
        wanted, found = (rows.prefill([0], [read], num_logits=[len(read)]).double() for rows in sides)
        error += float((found - wanted).square().sum())
        size += float((wanted - wanted.mean(1, keepdim=True)).square().sum())
        log_probs = [logits.log_softmax(1) for logits in (wanted, found)]
        divergence += float((log_probs[0].exp() * (log_probs[0] - log_probs[1])).sum())
        for side, values in enumerate(log_probs):
            losses[side] -= float(values.gather(1, window[1:, None]).sum())
    count = windows[:, 1:].numel()
    return {
        "bits": num_bytes * 8 / model.config.num_parameters,
        "error": math.sqrt(error / size),
        "divergence": divergence / count,
        "perplexity": math.exp(losses[1] / count),
        "change": math.exp((losses[1] - losses[0]) / count) - 1.0,
    }


def measure_ours(
    loaded: LoadedModel, calibration: Path, windows: torch.Tensor, rows: dict[str, dict[str, float]]
) -> None:
    for name, weights in OURS.items():
        if "calibrated" in name:
            stored = calibrated_tensors(loaded.model, calibration_windows(str(calibration), loaded.tokenizer))
        else:
            stored = named_tensors(loaded.model, weights)
        tensors = dict(stored)
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        add(rows, name, measured(loaded.model, rounded(loaded.model, weights, tensors), windows, num_bytes))


def measure_llama(loaded: LoadedModel, folder: Path, windows: torch.Tensor, rows: dict[str, dict[str, float]]) -> None:
    base = folder / "base"
    options: dict[str, Any] = {"source": "model", "format": "gguf", "verify": False}
    export_program(loaded.model, loaded.tokenizer, base, **options)
    for number, name in enumerate([*GGUF, *THEIRS]):
        path = folder / f"side{number}"
        if name in THEIRS:
            llama_quantised(base, path, *THEIRS[name])
        else:
            export_program(loaded.model, loaded.tokenizer, path, quantization=GGUF[name], **options)
        add(rows, name, measured(loaded.model, Program(path).model, windows, gguf_bytes(path)))


def add(rows: dict[str, dict[str, float]], name: str, found: dict[str, float]) -> None:
    rows[name] = found
    print(f"{name:26}" + "".join(f"  {key} {value:.4g}" for key, value in found.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration", type=Path, help="text")
    parser.add_argument("text", type=Path, help="text that all are measured on")
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--windows", type=int, default=32)
    args = parser.parse_args()
    loaded = load(args.model, dtype="float32")
    tokens = loaded.tokenizer.encode(args.text.read_text(encoding="utf-8"))
    count = len(tokens) // WINDOW_TOKENS
    windows = torch.tensor(tokens[: count * WINDOW_TOKENS]).view(count, WINDOW_TOKENS)
    windows = windows[:: max(1, count // args.windows)][: args.windows]
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        calibration = Path(folder) / "calibration.txt"
        calibration.write_bytes(args.calibration.read_bytes())
        measure_ours(loaded, calibration, windows, rows)
        measure_llama(loaded, Path(folder), windows, rows)
    print(f"error of calibrated int4 over Q4_0's; {len(windows)} windows; {machine()}")
    for name in ("llama.cpp Q4_0", "llama.cpp Q4_0, its own"):
        print(f"  {name:26}{rows['bloomlm int4, calibrated']['error'] / rows[name]['error']:.2f}")
    record({name: [found] for name, found in rows.items()})


if __name__ == "__main__":
    main()
