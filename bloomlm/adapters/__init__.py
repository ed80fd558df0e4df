"""What learns in a model, as values: one file for each kind, and the table of the kinds that PEFT's files can hold."""

from collections.abc import Mapping
from typing import Any

from bloomlm.adapters.base import Adapter
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.errors import AdapterError

# peft_type and use_dora in adapter_config.json -> kind.
KINDS: dict[tuple[str, bool], type[Adapter]] = {
    ("LORA", False): LoraConfig,
    ("LORA", True): DoraConfig,
    ("PREFIX_TUNING", False): PrefixConfig,
}


def kind_in_peft(values: Mapping[str, Any]) -> type[Adapter]:
    """The kind of adapter that an adapter_config.json with these contents describes.

    Raises:
        AdapterError: bloomlm does not have it.
    """
    peft_type, uses_dora = values.get("peft_type"), bool(values.get("use_dora"))
    kind = KINDS.get((str(peft_type), uses_dora))
    if kind is None:
        with_dora = " with use_dora" if uses_dora else ""
        known = " and ".join(dict.fromkeys(name for name, _ in KINDS))
        raise AdapterError(f"its peft_type is {peft_type!r}{with_dora}; bloomlm reads {known}")
    return kind
