"""Programs of every format in the engine: the tokens that each gives alone."""

import asyncio
from pathlib import Path

import pytest

from bloomlm.api import load
from bloomlm.errors import AdapterError, ConfigError, GenerationError
from bloomlm.export.program import export_program
from bloomlm.generation.config import BeamSearch, GenerationConfig, Greedy, Sampling
from bloomlm.runtime import Program
from bloomlm.serving.engine import Engine
from bloomlm.serving.options import EngineOptions
from bloomlm.serving.request import GenerationRequest, Output, RequestHandle, TokenOutput
from tests.serving import Alone

NEEDS = {
    "pt2": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "gguf": ("gguf", "llama_cpp"),
}
TOLERANCES = {"pt2": 5e-5, "onnx": 5e-5, "openvino": 1e-4, "gguf": 2e-3}
"""Of log-probabilities. llama.cpp computes GELU through a table in half precision."""
OPTIONS = EngineOptions(max_num_seqs=4, max_step_tokens=24, max_model_len=100, kv_cache_gb=0.01)
PROMPT = "Once upon a time there was a little house in the wood, and in it lived an old woman with her"


async def collect(handle: RequestHandle) -> list[Output]:
    return [output async for output in handle.outputs()]


@pytest.mark.parametrize("format", NEEDS)
def test_programs_serve_what_they_give_alone(tmp_path: Path, no_compiler: None, format: str) -> None:
    for module in NEEDS[format]:
        pytest.importorskip(module, reason=f"the extra {format} is not installed")
    loaded = load("builtin:tiny", dtype="float32")
    export_program(loaded.model, loaded.tokenizer, tmp_path / "bloom", source="tiny", format=format, verify=False)
    program = Program(tmp_path / "bloom")
    [prompt] = program.tokenizer.encode_batch([PROMPT])
    requests = [
        GenerationRequest(
            prompt=prompt[: len(prompt) - number % 3],
            config=GenerationConfig(strategy=strategy, max_new_tokens=12, num_log_probs=scored),
        )
        for number, (strategy, scored) in enumerate(
            [(Greedy(), 2), (Sampling(seed=4), None), (BeamSearch(num_beams=2), None), (Greedy(), None)] * 2
        )
    ]
    engine = Engine(program, OPTIONS)
    engine.start()
    with pytest.raises(AdapterError, match="an exported program takes no adapters"):
        engine.load_adapter("lora", tmp_path)

    async def main() -> list[list[Output]]:
        return await asyncio.gather(*[collect(engine.submit(request)) for request in requests])

    results = asyncio.run(asyncio.wait_for(main(), 120))
    alone = Alone(program)
    for request, outputs in zip(requests, results, strict=True):
        found = [output for output in outputs if isinstance(output, TokenOutput)]
        [(tokens, _)] = alone.results(request)
        assert [output.token for output in found] == tokens
        if request.config.num_log_probs:
            rows = alone.log_probs(request.prompt + tokens)[len(request.prompt) - 1 :]
            expected = [float(row[token]) for row, token in zip(rows, tokens, strict=True)]
            assert [output.log_prob for output in found] == pytest.approx(expected, abs=TOLERANCES[format])
    features = program.model.features
    assert (engine.stats().prefix_hits > 0) == features.blocks == engine.options.prefix_caching
    if not features.scores_chunks:
        with pytest.raises(GenerationError, match="cannot score prompts"):
            engine.submit(GenerationRequest(prompt=prompt, prompt_log_probs=0, score_only=True))
        with pytest.raises(ConfigError, match="--prompt_lookup needs"):
            Engine(program, EngineOptions(max_num_seqs=4, prompt_lookup=2, kv_cache_gb=0.01))
    engine.close(drain=True)
