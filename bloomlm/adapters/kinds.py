"""The kinds of adapters that files can hold."""

from bloomlm.adapters.base import Adapter
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig

KINDS_BY_PEFT_TYPE: dict[str, type[Adapter]] = {"LORA": LoraConfig, "PREFIX_TUNING": PrefixConfig}
"""peft_type in adapter_config.json -> kind."""
