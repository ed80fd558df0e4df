"""bloomlm: one toolkit for the BLOOM and BLOOMZ language models.

Importing it costs next to nothing: the names below are loaded, and PyTorch with them, when they are first used.
"""

import importlib
from typing import TYPE_CHECKING

from bloomlm.errors import (
    AdapterError,
    BackendMissingError,
    BloomlmError,
    CheckpointError,
    ClosingError,
    ConfigError,
    DataError,
    GenerationError,
    ProgramError,
    QueueFullError,
    ServingError,
    TrainingError,
)
from bloomlm.version import __version__

if TYPE_CHECKING:
    from bloomlm.adapters.lora import LoraConfig
    from bloomlm.adapters.prefix import PrefixConfig
    from bloomlm.api import LoadedModel, evaluate, finetune, generate, load
    from bloomlm.data.tokenizer import Tokenizer
    from bloomlm.evaluation.report import EvaluationReport
    from bloomlm.generation.config import BeamSearch, GenerationConfig, Greedy, Sampling
    from bloomlm.generation.text import Completion
    from bloomlm.model.bloom import BloomForCausalLM
    from bloomlm.model.config import BloomConfig
    from bloomlm.training.config import TrainingConfig

# Public name -> the module that has it.
_LAZY = {
    "BeamSearch": "bloomlm.generation.config",
    "BloomConfig": "bloomlm.model.config",
    "BloomForCausalLM": "bloomlm.model.bloom",
    "Completion": "bloomlm.generation.text",
    "EvaluationReport": "bloomlm.evaluation.report",
    "GenerationConfig": "bloomlm.generation.config",
    "Greedy": "bloomlm.generation.config",
    "LoadedModel": "bloomlm.api",
    "LoraConfig": "bloomlm.adapters.lora",
    "PrefixConfig": "bloomlm.adapters.prefix",
    "Sampling": "bloomlm.generation.config",
    "Tokenizer": "bloomlm.data.tokenizer",
    "TrainingConfig": "bloomlm.training.config",
    "evaluate": "bloomlm.api",
    "finetune": "bloomlm.api",
    "generate": "bloomlm.api",
    "load": "bloomlm.api",
}

__all__ = [
    "AdapterError",
    "BackendMissingError",
    "BeamSearch",
    "BloomConfig",
    "BloomForCausalLM",
    "BloomlmError",
    "CheckpointError",
    "ClosingError",
    "Completion",
    "ConfigError",
    "DataError",
    "EvaluationReport",
    "GenerationConfig",
    "GenerationError",
    "Greedy",
    "LoadedModel",
    "LoraConfig",
    "PrefixConfig",
    "ProgramError",
    "QueueFullError",
    "Sampling",
    "ServingError",
    "Tokenizer",
    "TrainingConfig",
    "TrainingError",
    "__version__",
    "evaluate",
    "finetune",
    "generate",
    "load",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'bloomlm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
