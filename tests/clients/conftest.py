"""One server for all clients: the built-in model in fp32 with four adapters and a chat template."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from bloomlm.adapters.base import Adapter
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.api import LoadedModel, load
from bloomlm.checkpoint.source import resolve_source
from tests.clients.server import Server, running
from tests.tiny_bloom import write_adapter

MODEL = "builtin:tiny"
ADAPTERS: dict[str, Adapter] = {
    "lora": LoraConfig(r=3, lora_alpha=12),
    "rslora": LoraConfig(r=4, target_modules=BLOCK_LINEARS, use_rslora=True),
    "dora": DoraConfig(r=2, target_modules=BLOCK_LINEARS),
    "prefix": PrefixConfig(num_prefix_tokens=5),
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Alone:
    """What the model gives where nothing else is computed.

    Args:
        adapters: name -> directory.
    """

    def __init__(self, adapters: dict[str, Path]) -> None:
        self._adapters = adapters
        self.model = cache(self._load)

    def _load(self, name: str) -> LoadedModel:
        return load(MODEL, dtype="float32", adapter_path=self._adapters.get(name))

    def texts(self, prompts: str | list[str], model: str = MODEL, **options: object) -> list[str]:
        """The completions of `bloomlm predict` with these options."""
        return [found.completion for found in self.model(model).generate(prompts, **options)]


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("adapters")
    base = resolve_source(MODEL).directory
    return {name: write_adapter(directory / name, base, adapter) for name, adapter in ADAPTERS.items()}


@pytest.fixture(scope="session")
def alone(adapters: dict[str, Path]) -> Alone:
    return Alone(adapters)


@pytest.fixture(scope="session")
def server(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    template = tmp_path_factory.mktemp("chat") / "chat.jinja"
    template.write_text(CHAT_TEMPLATE)
    flags = ["--model_name_or_path", MODEL, "--dtype", "float32", "--chat_template", str(template)]
    flags += [word for name, path in adapters.items() for word in ("--lora", f"{name}={path}")]
    # A small step, so that prompts are read in several.
    with running([*flags, "--max_step_tokens", "96", "--max_num_seqs", "16", "--kv_cache_gb", "0.3"]) as found:
        yield found
