"""The engine and named adapters on the GPU: every request gets what its model gives it alone on the CPU."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from bloomlm.adapters.bank import AdapterBank
from bloomlm.adapters.base import Adapter
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.api import LoadedModel
from bloomlm.checkpoint.adapters.load import load_adapter, load_named_adapter
from bloomlm.checkpoint.reader import load_model
from bloomlm.generation.config import BeamSearch, GenerationConfig, Sampling
from bloomlm.serving.engine import Engine
from bloomlm.serving.options import EngineOptions
from bloomlm.serving.request import GenerationRequest, RequestHandle, TokenOutput
from tests.gpu.models import GPU, on_gpu
from tests.serving import Alone, small_model
from tests.tiny_bloom import write_adapter, write_bloom

ADAPTERS: dict[str, Adapter] = {
    "lora": LoraConfig(r=3, target_modules=BLOCK_LINEARS),
    "dora": DoraConfig(r=2, target_modules=BLOCK_LINEARS),
    "prefix": PrefixConfig(num_prefix_tokens=5),
}


def request(start: int, length: int, **options: Any) -> GenerationRequest:
    config = GenerationConfig(**({"max_new_tokens": 10} | options))
    return GenerationRequest(prompt=[4 + (start * 7 + place * place) % 90 for place in range(length)], config=config)


@pytest.mark.parametrize("prompt_lookup", [0, 3])
def test_requests_get_what_they_get_alone_on_the_cpu(prompt_lookup: int) -> None:
    loaded = small_model()
    asked = [request(number % 7, 5 + 3 * number) for number in range(14)]
    asked[3] = request(3, 9, strategy=Sampling(seed=4), num_return_sequences=3)
    asked[7] = request(7, 40, strategy=BeamSearch(num_beams=3), num_return_sequences=2)
    options = EngineOptions(
        max_num_seqs=4, max_step_tokens=32, max_model_len=120, kv_cache_gb=0.01, prompt_lookup=prompt_lookup
    )
    engine = Engine(LoadedModel(on_gpu(loaded.model), loaded.tokenizer), options)
    engine.start()

    async def tokens(handle: RequestHandle) -> list[list[int]]:
        outputs = [output async for output in handle.outputs() if isinstance(output, TokenOutput)]
        return [[o.token for o in outputs if o.index == i] for i in range(1 + max(o.index for o in outputs))]

    async def main() -> list[list[list[int]]]:
        handles = [engine.submit(item) for item in asked]
        return await asyncio.gather(*map(tokens, handles))

    found = asyncio.run(asyncio.wait_for(main(), 60))
    engine.close(drain=False)
    alone = Alone(loaded)
    assert found == [[ids for ids, _ in alone.results(item)] for item in asked]
    assert engine.stats().prefix_hits > 0


def test_rows_of_many_adapters_equal_their_models_alone(tmp_path: Path) -> None:
    base = write_bloom(tmp_path / "base")
    paths = {name: write_adapter(tmp_path / name, base, adapter) for name, adapter in ADAPTERS.items()}
    model = load_model(base, device=GPU)
    bank = AdapterBank(model)
    for name, path in paths.items():
        load_named_adapter(bank, name, path)
    names = [None, "prefix", "lora", "dora", "lora", None]
    draw = torch.Generator().manual_seed(3)
    texts = [torch.randint(4, 250, (length,), generator=draw).tolist() for length in (12, 5, 30, 1, 17, 8)]
    rows = model.open_rows(len(names), 40)
    for row, name in enumerate(names):
        rows.set_adapter(row, name)
    with torch.inference_mode():
        first = rows.prefill(range(len(names)), [text[:-1] or text for text in texts])
        more = [row for row, text in enumerate(texts) if len(text) > 1]
        second = rows.decode_step(more, torch.tensor([texts[row][-1] for row in more]))
    for row, (name, text) in enumerate(zip(names, texts, strict=True)):
        alone = load_model(base)
        if name is not None:
            load_adapter(alone, paths[name])
        with torch.no_grad():
            expected = alone.eval()(torch.tensor([text]))[0]
        found = [first[row], second[more.index(row)]] if row in more else [first[row]]
        torch.testing.assert_close(torch.stack(found).cpu(), expected[-len(found) :], rtol=1e-4, atol=1e-4)
