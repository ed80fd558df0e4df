"""What int8 and int4 cost: programs and llama.cpp's files of one model, compared with the model on text.

    python benchmarks/quantisation.py wikitext-2.valid.tokens wikitext-2.test.tokens

The first text calibrates int4 (`bloomlm export --calibration_file`), on the second all are measured: windows of 256
tokens, of which the second half is scored. `error` is that of the logits, ||a - b|| / ||b|| after subtracting their
mean over the vocabulary from b; `change` that of the perplexity. `bits` are those of all weights a weight, with scales,
norms and biases. The gguf files are of `bloomlm export` except for the rows "its own", which llama.cpp's quantiser
makes: Q4_0 throughout ("pure"), and Q4_K_M, which has matrices of more bits too. Programs are not compiled, which takes
minutes; compiled ones also round activations, by a hundredth of the error of int4.
"""

import argparse
import ctypes
import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import machine, record

WINDOW_TOKENS = 256
OURS = {
    "bloomlm int8": ("pt2", "int8", False),
    "bloomlm int4": ("pt2", "int4", False),
    "bloomlm int4, calibrated": ("pt2", "int4", True),
    "llama.cpp Q8_0": ("gguf", "int8", False),
    "llama.cpp Q4_0": ("gguf", "int4", False),
}
THEIRS = {"llama.cpp Q4_0, its own": ("MOSTLY_Q4_0", True), "llama.cpp Q4_K_M, its own": ("MOSTLY_Q4_K_M", False)}


def llama_quantised(source: Path, path: Path, kind: str, pure: bool) -> None:
    """A program whose gguf file llama.cpp's quantiser makes of the one in float32."""
    from llama_cpp import llama_cpp

    from bloomlm.runtime.manifest import Manifest, describe_file

    silence = llama_cpp.llama_log_callback(lambda *message: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.pure = getattr(llama_cpp, f"LLAMA_FTYPE_{kind}"), pure
    files = [os.fsencode(one.with_suffix(".gguf")) for one in (source, path)]
    assert llama_cpp.llama_model_quantize(*files, ctypes.byref(parameters)) == 0
    made = path.with_suffix(".gguf")
    manifest = Manifest.read(source.with_suffix(".json"))
    changed = dataclasses.replace(manifest, files={made.name: describe_file(made)})
    path.with_suffix(".json").write_text(changed.to_json(), encoding="utf-8")


def weight_bytes(path: Path) -> int:
    """Bytes of a program's tensors."""
    if path.with_suffix(".safetensors").exists():
        return path.with_suffix(".safetensors").stat().st_size
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(path.with_suffix(".gguf")).tensors)


def measured(loaded: Any, path: Path, windows: torch.Tensor) -> dict[str, float]:
    from bloomlm.export.parity import compare
    from bloomlm.runtime import Program

    half = WINDOW_TOKENS // 2
    found = compare(loaded.model, Program(path).model, windows[:, :half].tolist(), windows[:, half:])
    return {
        "bits": weight_bytes(path) * 8 / loaded.model.config.num_parameters,
        "error": found.logits_error,
        "perplexity": found.program_perplexity,
        "change": found.perplexity_change,
        "equal_tokens": found.equal_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration", type=Path, help="text")
    parser.add_argument("text", type=Path, help="text that all are measured on")
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--windows", type=int, default=32)
    args = parser.parse_args()

    import bloomlm.export.formats.pt2
    from bloomlm.api import load
    from bloomlm.export.program import export_program

    bloomlm.export.formats.pt2.find_compiler = lambda: None
    loaded = load(args.model, dtype="float32")
    tokens = loaded.tokenizer.encode(args.text.read_text(encoding="utf-8"))
    count = len(tokens) // WINDOW_TOKENS
    windows = torch.tensor(tokens[: count * WINDOW_TOKENS]).view(count, WINDOW_TOKENS)[:: max(1, count // args.windows)]
    windows = windows[: args.windows]
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        calibration = Path(folder) / "calibration.txt"
        calibration.write_bytes(args.calibration.read_bytes())
        base = Path(folder) / "base"
        sides: list[tuple[str, Any]] = [*OURS.items(), *THEIRS.items()]
        export_program(loaded.model, loaded.tokenizer, base, source=args.model, format="gguf", verify=False)
        for number, (name, made) in enumerate(sides):
            path = Path(folder) / f"side{number}"
            if name in THEIRS:
                llama_quantised(base, path, *made)
            else:
                form, quantization, calibrates = made
                export_program(
                    loaded.model,
                    loaded.tokenizer,
                    path,
                    source=args.model,
                    format=form,
                    quantization=quantization,
                    calibration_file=str(calibration) if calibrates else None,
                    verify=False,
                )
            rows[name] = measured(loaded, path, windows)
            print(f"{name:26}" + "".join(f"  {key} {value:.4g}" for key, value in rows[name].items()), flush=True)
    print(f"error of calibrated int4 over Q4_0's; {len(windows)} windows; {machine()}")
    for name in ("llama.cpp Q4_0", "llama.cpp Q4_0, its own"):
        print(f"  {name:26}{rows['bloomlm int4, calibrated']['error'] / rows[name]['error']:.2f}")
    record({name: [found] for name, found in rows.items()})


if __name__ == "__main__":
    main()
