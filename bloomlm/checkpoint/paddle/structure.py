"""How an adapter that PaddleNLP began learns on: what PEFT's files cannot say.

Of a LoRA of before July 2023 only the blocks of lora_B learn, and a prefix keeps the encoder it was trained with, so
that the recorded moments fit. Our own checkpoints of such a run note this in paddle_adapter.json, beside PEFT's files,
and so go on like any other; the values of what learns are in their training state.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bloomlm.adapters.base import apply_adapter
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint.paddle.lora import Blocks, PaddleLora
from bloomlm.checkpoint.paddle.prefix import Arrangement, PaddlePrefix, PaddlePrefixEncoder, PrefixLayout
from bloomlm.errors import CheckpointError
from bloomlm.model.bloom import BloomForCausalLM

STRUCTURE_FILE = "paddle_adapter.json"


@dataclass(frozen=True, kw_only=True)
class LoraStructure:
    """A LoRA of any of PaddleNLP's eras, as a plain one with entries that do not learn."""

    config: LoraConfig
    """Of the plain LoRA."""
    blocks: Mapping[str, Blocks]
    """Name of each module with an update -> the blocks of its lora_B."""

    @property
    def num_slots(self) -> int:
        """So many times PaddleNLP's r is the plain LoRA's (k), in most modules."""
        numbers = [block.num_enabled for block in self.blocks.values()]
        return max(set(numbers), key=numbers.count)

    def install(self, model: BloomForCausalLM, device: torch.device | None = None) -> None:
        """Put it into a model, in the precision of the model; the values are yet to come.

        Args:
            model: the base model, without an adapter.
            device: where the adapter goes; None: where the model is.

        Raises:
            AdapterError: it has an adapter already.
        """
        apply_adapter(model, self.config, _private_generator(model, device), device)
        for name, module in self.config.layers(model):
            if name not in self.blocks:  # PaddleNLP gave this block none: its update stays zero
                module.lora_A.requires_grad_(False)
                module.lora_B.requires_grad_(False)
                continue
            learns = self.blocks[name].trained_entries(module.lora_B.shape)
            if not learns.all():
                module.lora_B_learns = learns.to(module.lora_B.device)


@dataclass(frozen=True, kw_only=True)
class PrefixStructure:
    """A prefix in PaddleNLP's own order of columns."""

    config: PrefixConfig
    """Number of virtual tokens, and the projection it is trained with."""
    arrangement: Arrangement
    """What its numbers mean."""

    def install(self, model: BloomForCausalLM, device: torch.device | None = None) -> None:
        """Put it into a model, in the precision of the model; the values are yet to come.

        Args:
            model: the base model, without an adapter.
            device: where the adapter goes; None: where the model is.

        Raises:
            AdapterError: it has an adapter already.
        """
        apply_adapter(model, self.config, _private_generator(model, device), device)
        plain = model.transformer.prefix
        assert plain is not None
        with torch.device("meta"):
            encoder = PaddlePrefixEncoder(self.config, model.config, self.arrangement)
        encoder.load_state_dict(plain.state_dict(), assign=True)
        model.transformer.prefix = encoder.train(model.training)


AdapterStructure = LoraStructure | PrefixStructure


def structure_of(adapter: PaddleLora | PaddlePrefix) -> AdapterStructure:
    """The structure of an adapter in PaddleNLP's files."""
    if isinstance(adapter, PaddleLora):
        return LoraStructure(config=adapter.config, blocks=adapter.blocks)
    return PrefixStructure(config=adapter.config, arrangement=adapter.arrangement)


def write_structure(structure: AdapterStructure, directory: Path) -> None:
    """Note a structure in a checkpoint.

    Args:
        structure: what learns.
        directory: of the checkpoint.

    Raises:
        CheckpointError: it cannot be written.
    """
    values: dict[str, Any] = {"config": dataclasses.asdict(structure.config)}
    if isinstance(structure, LoraStructure):
        values["blocks"] = {name: dataclasses.asdict(blocks) for name, blocks in structure.blocks.items()}
    else:
        values["arrangement"] = dataclasses.asdict(structure.arrangement) | {
            "layout": structure.arrangement.layout.value
        }
    try:
        (directory / STRUCTURE_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{directory / STRUCTURE_FILE} cannot be written: {error}") from error


def read_structure(directory: Path) -> AdapterStructure | None:
    """The structure that a checkpoint of ours notes; None where it notes none.

    Args:
        directory: of the checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = directory / STRUCTURE_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if "blocks" in values:
            lists = {name: tuple(values["config"][name]) for name in ("target_modules", "replaced_names")}
            blocks = {
                name: Blocks(slots=tuple(block["slots"]), groups=block["groups"])
                for name, block in values["blocks"].items()
            }
            return LoraStructure(config=LoraConfig(**(values["config"] | lists)), blocks=blocks)
        arrangement = values["arrangement"]
        return PrefixStructure(
            config=PrefixConfig(**values["config"]),
            arrangement=Arrangement(
                layout=PrefixLayout(arrangement["layout"]),
                tp_degree=arrangement["tp_degree"],
                head_shape=tuple(arrangement["head_shape"]),
            ),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}; go on from another checkpoint") from error


def _private_generator(model: BloomForCausalLM, device: torch.device | None) -> torch.Generator:
    """Fresh values are drawn only to be replaced: the program's own randomness shall not notice."""
    return torch.Generator(device or model.transformer.word_embeddings.weight.device)
