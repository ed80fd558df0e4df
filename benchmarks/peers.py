"""Other runtimes on the model that generate.py measures, each through its own interface, as it runs by default.

All take prompts of equal length. `prepare` makes what a peer reads, beside the random model, on first use.

- transformers: its forward pass and its own cache.
- llama.cpp: llama-cpp-python's bindings, all sequences in one batch, llama.cpp's defaults (a cache in 16 bits).
- CTranslate2: its converter and generate_batch; it gives no logits between steps, so a step's time is that of N + 1
  tokens less that of one, over N.
- onnxruntime: bloomlm's graph, since optimum's computes logits for the whole prompt; the cache goes from step to step
  without a copy in Python.
- OpenVINO: optimum-intel's stateful model (the cache stays inside), with the head on the last position only, as
  openvino_genai cuts it; int8 is NNCF's compression of all weights, as optimum-intel's --weight-format int8 does it.
  optimum-intel wants an older transformers, so its command may lie in another environment: BLOOMLM_BENCH_OPTIMUM_CLI.

Shapes: B rows, T tokens, V vocabulary.
"""

import ctypes
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

Prompts = list[list[int]]


class Transformers:
    def __init__(self, model: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._cache: Any = None

    def prefill(self, prompts: Prompts, max_new_tokens: int) -> tuple["Transformers", Any]:
        self._cache = None
        return self, self._read(self._torch.tensor(prompts))

    def decode_step(self, tokens: Any) -> Any:
        return self._read(self._torch.as_tensor(tokens)[:, None])

    def _read(self, tokens: Any) -> Any:
        with self._torch.inference_mode():
            out = self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        return out.logits[:, -1]


class LlamaCpp:
    def __init__(self, path: Path, threads: int) -> None:
        from llama_cpp import llama_cpp

        self._library, self._threads, self._context = llama_cpp, threads, None
        self._silence = llama_cpp.llama_log_callback(lambda *message: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def prefill(self, prompts: Prompts, max_new_tokens: int) -> tuple["LlamaCpp", np.ndarray]:
        if self._context is not None:
            self._library.llama_free(self._context)
        parameters = self._library.llama_context_default_params()
        parameters.n_ctx = len(prompts) * (len(prompts[0]) + max_new_tokens)
        parameters.n_seq_max = parameters.n_outputs_max = len(prompts)
        parameters.n_threads = parameters.n_threads_batch = self._threads
        self._context = self._library.llama_init_from_model(self._model, parameters)
        self._length = 0
        return self, self._read(np.array(prompts))

    def decode_step(self, tokens: Any) -> np.ndarray:
        return self._read(np.asarray(tokens)[:, None])

    def _read(self, tokens: np.ndarray) -> np.ndarray:
        """[B, T] new tokens -> [B, V] logits after the last."""
        library, (rows, length) = self._library, tokens.shape
        batch = library.llama_batch_init(tokens.size, 0, 1)
        batch.n_tokens = tokens.size
        for place, token in enumerate(tokens.ravel().tolist()):
            row, column = divmod(place, length)
            batch.token[place], batch.pos[place] = token, self._length + column
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
            batch.logits[place] = column == length - 1
        code = library.llama_decode(self._context, batch)
        library.llama_batch_free(batch)
        assert code == 0, f"llama_decode gave {code}"
        self._length += length
        last = [library.llama_get_logits_ith(self._context, (row + 1) * length - 1) for row in range(rows)]
        return np.stack([np.ctypeslib.as_array(pointer, (self._vocab_size,)) for pointer in last])


class OnnxRuntime:
    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._inputs = self._session.get_inputs()
        self._outputs = [output.name for output in self._session.get_outputs()]

    def prefill(self, prompts: Prompts, max_new_tokens: int) -> tuple["OnnxRuntime", np.ndarray]:
        _, heads, _, head_dim = self._inputs[2].shape
        empty = np.zeros((len(prompts), heads, 0, head_dim), dtype=np.float32)
        self._cache = [self._value(empty) for _ in self._inputs[2:]]
        self._starts = self._value(np.zeros(len(prompts), dtype=np.int64))
        return self, self._read(np.array(prompts))

    def decode_step(self, tokens: Any) -> np.ndarray:
        return self._read(np.asarray(tokens)[:, None])

    def _read(self, tokens: np.ndarray) -> np.ndarray:
        given = [self._value(tokens), self._starts, *self._cache]
        names = [tensor.name for tensor in self._inputs]
        logits, *self._cache = self._session.run_with_ort_values(self._outputs, dict(zip(names, given, strict=True)))
        return logits.numpy()


class OpenVino:
    def __init__(self, path: Path, threads: int) -> None:
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        if path.parent.name.endswith("fp32"):
            settings["KV_CACHE_PRECISION"] = "f32"
        model = openvino.Core().read_model(path)
        _keep_last_position(model)
        self._names = {name for tensor in model.inputs for name in tensor.get_names()}
        self._request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def prefill(self, prompts: Prompts, max_new_tokens: int) -> tuple["OpenVino", np.ndarray]:
        self._request.reset_state()
        self._length = 0
        return self, self._read(np.array(prompts))

    def decode_step(self, tokens: Any) -> np.ndarray:
        return self._read(np.asarray(tokens)[:, None])

    def _read(self, tokens: np.ndarray) -> np.ndarray:
        rows, length = tokens.shape
        self._length += length
        given = {
            "input_ids": tokens,
            "attention_mask": np.ones((rows, self._length), dtype=np.int64),
            "position_ids": np.tile(np.arange(self._length - length, self._length), (rows, 1)),
            "beam_idx": np.arange(rows, dtype=np.int32),
        }
        result = self._request.infer({name: given[name] for name in self._names & given.keys()})
        return next(iter(result.values()))[:, -1]


def _keep_last_position(model: Any) -> None:
    """Put a slice before the head, which optimum-intel's model computes for every position."""
    import openvino.opset13 as ops

    head = model.get_results()[0].input_value(0).get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    start, stop, step, axis = (ops.constant([number], dtype=np.int64) for number in (-1, 2**31 - 1, 1, 1))
    head.input(0).replace_source_output(ops.slice(head.input_value(0), start, stop, step, axis).output(0))


class CTranslate2:
    """Drives itself: it has no step that gives logits."""

    def __init__(self, directory: Path, threads: int) -> None:
        import ctranslate2

        self._library = ctranslate2
        kind = directory.name.removeprefix("ctranslate2-")
        self._generator = ctranslate2.Generator(
            str(directory), device="cpu", compute_type=kind, inter_threads=1, intra_threads=threads
        )

    def read(self, prompts: Prompts) -> None:
        self._generate(prompts, 1)

    def step_seconds(self, prompts: Prompts, new_tokens: int) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            self._generate(prompts, 1)
            first = time.perf_counter()
            self._generate(prompts, new_tokens + 1)
            times.append((time.perf_counter() - first - (first - start)) / new_tokens)
        return statistics.median(times)

    def logits(self, prompt: list[int], forced: list[int]) -> np.ndarray:
        out = self._generator.forward_batch(_words([prompt + forced]), return_log_probs=False)
        return np.array(out)[0, len(prompt) - 1 :]

    def _generate(self, prompts: Prompts, num_new: int) -> None:
        results = self._generator.generate_batch(
            _words(prompts),
            min_length=num_new,
            max_length=num_new,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        found = {len(result.sequences_ids[0]) for result in results}
        assert found == {num_new}, f"CTranslate2 gave {found} tokens instead of {num_new}"


def _words(prompts: Prompts) -> list[list[str]]:
    return [[str(token) for token in prompt] for prompt in prompts]


def convert_ctranslate2(model: Path, directory: Path, kind: str) -> None:
    """With a vocabulary of the ids themselves, since a random model's tokenizer has fewer."""
    from ctranslate2.converters import TransformersConverter

    size = json.loads((model / "config.json").read_text())["vocab_size"]
    ids = {str(number): number for number in range(size)}
    tokenizer = SimpleNamespace(get_vocab=lambda: ids, unk_token="0", bos_token="1", eos_token="2")

    class Converter(TransformersConverter):
        def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **kwargs: Any) -> Any:
            return tokenizer

    Converter(str(model)).convert(str(directory), quantization=kind, force=True)


def convert_openvino(model: Path, directory: Path, kind: str) -> None:
    """fp32, or int8 for all weights."""
    arguments = ["--task", "text-generation-with-past", "--weight-format", kind, "--disable-convert-tokenizer"]
    command = [_optimum_cli(), "export", "openvino", "--model", str(model), *arguments, str(directory)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _optimum_cli() -> str:
    return os.environ.get("BLOOMLM_BENCH_OPTIMUM_CLI", "optimum-cli")


PACKAGES = {
    "transformers": ["transformers"],
    "llama.cpp": ["gguf", "llama_cpp"],
    "ctranslate2": ["ctranslate2", "transformers"],
    "onnxruntime": ["onnx", "onnxscript", "onnxruntime"],
    "openvino": ["openvino"],
}


def missing_packages(kind: str) -> list[str]:
    """What a peer needs and this environment does not have."""
    missing = [name for name in PACKAGES.get(kind, []) if importlib.util.find_spec(name) is None]
    if kind == "openvino" and shutil.which(_optimum_cli()) is None:
        missing.append("optimum-cli")
    return missing
