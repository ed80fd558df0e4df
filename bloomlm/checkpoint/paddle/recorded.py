"""An adapter that PaddleNLP began to train, with the parts of its training that PEFT's files cannot record.

In a LoRA from before July 2023 only blocks of lora_B are trained, and a prefix keeps the encoder that it is trained
with, so that the recorded moments of AdamW fit. When bloomlm continues such a run, its checkpoints record this in
paddle_adapter.json beside PEFT's files, and can be resumed too; their training state holds the parameters.

Shapes: P virtual tokens, L blocks, D hidden, H heads, K head_dim, t ranks, E the encoder's output [P, 2LD].
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bloomlm.adapters.base import apply_adapter
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig, PrefixEncoder
from bloomlm.checkpoint.adapters.peft import private_generator
from bloomlm.checkpoint.paddle.adapter_files import PrefixLayout
from bloomlm.errors import CheckpointError
from bloomlm.files.json_text import read_json
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig

RECORD_FILE = "paddle_adapter.json"


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Positions of the trained slots of one module's lora_B."""

    slots: tuple[bool, ...]
    """Which of the equal parts of the outputs are trained; (True,) for a plain LoRA."""
    groups: int
    """Equal pieces of the outputs within which the parts are counted: ranks (era A), heads (era M) or 1."""

    @property
    def num_enabled(self) -> int:
        """Number k of trained parts."""
        return sum(self.slots)

    def place(self, lora_b: Tensor) -> Tensor:
        """The stored lora_B [r, out * k / parts] as a plain one [out, k * r], zero outside the blocks."""
        lora_rank, k, parts = lora_b.shape[0], self.num_enabled, len(self.slots)
        stored = lora_b.unflatten(1, (self.groups, k, -1))
        width = stored.shape[-1]
        plain = lora_b.new_zeros(self.groups, parts, width, k, lora_rank)
        for slot, part in enumerate(index for index, enabled in enumerate(self.slots) if enabled):
            plain[:, part, :, slot] = stored[:, :, slot].permute(1, 2, 0)
        return plain.view(self.groups * parts * width, k * lora_rank)

    def trained_entries(self, plain_shape: torch.Size) -> Tensor:
        """Boolean [out, k * r]: the entries of a plain lora_B of that shape that lie in the blocks."""
        outputs, lora_rank = plain_shape[0], plain_shape[1] // self.num_enabled
        return self.place(torch.ones(lora_rank, outputs // len(self.slots) * self.num_enabled)) > 0


@dataclass(frozen=True, kw_only=True)
class RecordedLora:
    """A LoRA of any of PaddleNLP's eras, as a plain one with entries that are not trained."""

    config: LoraConfig
    """Configuration of the plain LoRA."""
    blocks: Mapping[str, Blocks]
    """Name of each module with an update -> the blocks of its lora_B."""
    kind: ClassVar[str] = "lora"

    @property
    def num_slots(self) -> int:
        """Ratio k of the plain LoRA's r to PaddleNLP's, in most modules."""
        numbers = [block.num_enabled for block in self.blocks.values()]
        return max(set(numbers), key=numbers.count)

    @property
    def flags(self) -> dict[str, Any]:
        """The flags of the recorded LoRA, before its conversion to a plain one."""
        return {
            "r": self.config.r // self.num_slots,
            "lora_alpha": self.config.alpha / self.num_slots,
            "lora_dropout": self.config.lora_dropout,
            "target_modules": self.config.target_modules,
        }

    def describe(self) -> str:
        """A description of its rank and scaling."""
        plain = "" if self.num_slots == 1 else f", as a plain one of r {self.config.r} in PEFT's files"
        return f"LoRA (r {self.flags['r']}, lora_alpha {self.flags['lora_alpha']:g}{plain})"

    def write(self, directory: Path) -> None:
        """Record it in paddle_adapter.json."""
        _write(directory, self)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """The adapter for the content of paddle_adapter.json."""
        lists = {name: tuple(values["config"][name]) for name in ("target_modules", "replaced_names")}
        blocks = {name: Blocks(slots=tuple(b["slots"]), groups=b["groups"]) for name, b in values["blocks"].items()}
        return cls(config=LoraConfig(**(values["config"] | lists)), blocks=blocks)

    def install(self, model: BloomForCausalLM, device: torch.device | None = None) -> None:
        """Install it as an adapter whose values are read afterwards; see RecordedAdapter."""
        apply_adapter(model, self.config, private_generator(model, device), device)
        for name, module in self.config.layers(model):
            if name not in self.blocks:  # PaddleNLP gave this module no update, so it stays zero
                module.lora_A.requires_grad_(False)
                module.lora_B.requires_grad_(False)
                continue
            learns = self.blocks[name].trained_entries(module.lora_B.shape)
            if not learns.all():
                module.lora_B_learns = learns.to(module.lora_B.device)


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """How the numbers of E become keys and values."""

    layout: PrefixLayout
    """Reread (old) or transposed (new)."""
    tp_degree: int
    """Number t of ranks that trained it."""
    head_shape: tuple[int, int, int]
    """L, H, K."""

    def arrange(self, encoded: Tensor) -> Tensor:
        """E [P, 2LD] as the flat prefix [P, 2LD], columns in the order (block, key or value, head, column)."""
        n_layer, n_head, head_dim = self.head_shape
        tokens, heads = encoded.shape[0], n_head // self.tp_degree
        slots = encoded.view(tokens, self.tp_degree, 2, n_layer, heads, head_dim)
        if self.layout is PrefixLayout.OLD:
            memory = slots.permute(1, 2, 3, 0, 4, 5).reshape(self.tp_degree, 2, n_layer, -1)
            keys = memory[:, 0].view(self.tp_degree, n_layer, heads, head_dim, tokens).permute(4, 1, 0, 2, 3)
            values = memory[:, 1].view(self.tp_degree, n_layer, heads, tokens, head_dim).permute(3, 1, 0, 2, 4)
            return torch.stack((keys, values), dim=2).reshape(tokens, -1)
        return slots.permute(0, 3, 2, 1, 4, 5).reshape(tokens, -1)

    def columns(self) -> Tensor:
        """New layout: for each column of the flat prefix, [2LD], the column of E that it is."""
        assert self.layout is PrefixLayout.NEW, "the old layout mixes tokens too"
        n_layer, n_head, head_dim = self.head_shape
        return self.arrange(torch.arange(2 * n_layer * n_head * head_dim).view(1, -1))[0]


@dataclass(frozen=True, kw_only=True)
class RecordedPrefix:
    """A prefix in PaddleNLP's own order of columns."""

    config: PrefixConfig
    """Number of virtual tokens, and the projection that it is trained with."""
    arrangement: Arrangement
    """How its numbers become keys and values."""
    kind: ClassVar[str] = "prefix_tuning"

    @property
    def flags(self) -> dict[str, Any]:
        """The flags of the recorded prefix, which bloomlm and PaddleNLP share."""
        return {name: getattr(self.config, name) for name in ("num_prefix_tokens", "prefix_projection")}

    def describe(self) -> str:
        """A description of its size and layout."""
        projection = ", with projection" if self.config.prefix_projection else ""
        degree = self.arrangement.tp_degree
        return (
            f"prefix of {self.config.num_prefix_tokens} tokens ({self.arrangement.layout.value} layout, trained by "
            f"{degree} rank{'s' if degree > 1 else ''}{projection})"
        )

    def write(self, directory: Path) -> None:
        """Record it in paddle_adapter.json."""
        _write(directory, self)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """The adapter for the content of paddle_adapter.json."""
        arrangement = values["arrangement"]
        return cls(
            config=PrefixConfig(**values["config"]),
            arrangement=Arrangement(
                layout=PrefixLayout(arrangement["layout"]),
                tp_degree=arrangement["tp_degree"],
                head_shape=tuple(arrangement["head_shape"]),
            ),
        )

    def install(self, model: BloomForCausalLM, device: torch.device | None = None) -> None:
        """Install it as an adapter whose values are read afterwards; see RecordedAdapter."""
        apply_adapter(model, self.config, private_generator(model, device), device)
        plain = model.transformer.prefix
        assert plain is not None
        with torch.device("meta"):
            encoder = PaddlePrefixEncoder(self.config, model.config, self.arrangement)
        encoder.load_state_dict(plain.state_dict(), assign=True)
        model.transformer.prefix = encoder.train(model.training)


class PaddlePrefixEncoder(PrefixEncoder):
    """An encoder with PaddleNLP's order of columns, so that PaddleNLP's optimizer state fits it."""

    def __init__(self, config: PrefixConfig, model_config: BloomConfig, arrangement: Arrangement) -> None:
        super().__init__(config, model_config)
        self.model_config = model_config
        self.arrangement = arrangement

    def flat(self) -> Tensor:
        """[P, 2 * L * D] in PEFT's order."""
        return self.arrangement.arrange(super().flat())

    def plain(self, tensors: Mapping[str, Tensor]) -> tuple[PrefixConfig, dict[str, Tensor]]:
        """The resulting keys and values, as a prefix without projection."""
        with torch.device("meta"):
            whole = PaddlePrefixEncoder(self.config, self.model_config, self.arrangement)
        whole.load_state_dict(dict(tensors), assign=True)
        with torch.no_grad():
            return PrefixConfig(num_prefix_tokens=self.config.num_prefix_tokens), {"embedding.weight": whole.flat()}


RecordedAdapter = RecordedLora | RecordedPrefix
"""An adapter that PaddleNLP began to train.

`kind` is the flag of finetune that trains such an adapter, and `flags` has the values of other flags in the recorded
run. `install(model, device)` puts it into a model without an adapter, in the precision of the model and on the model's
device if none is given; its values are read afterwards. `write(directory)` records it in a checkpoint of bloomlm's.
"""


def read_recorded_adapter(directory: Path) -> RecordedAdapter | None:
    """The adapter that a checkpoint written by bloomlm records; None if it records none.

    Raises:
        CheckpointError: the record cannot be read.
    """
    path = directory / RECORD_FILE
    if not path.is_file():
        return None
    try:
        values = read_json(path)
        kind = RecordedLora if "blocks" in values else RecordedPrefix
        return kind.from_values(values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}; resume from another checkpoint") from error


def _write(directory: Path, adapter: RecordedLora | RecordedPrefix) -> None:
    path = directory / RECORD_FILE
    values = dataclasses.asdict(adapter)
    try:
        path.write_text(json.dumps(values, indent=2, default=_plain_value) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _plain_value(value: Any) -> Any:
    """The value of a layout for JSON."""
    assert isinstance(value, PrefixLayout)
    return value.value
