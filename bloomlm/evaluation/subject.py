"""What is evaluated, on this rank, and how the report names it: a model or an exported program."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bloomlm.checkpoint.fingerprint import model_fingerprint
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.generation.language_model import LanguageModel
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.runtime.program import Program


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with its tokenizer."""

    model: LanguageModel
    tokenizer: Tokenizer
    mesh: Mesh
    """The ranks, which share the model or have copies of it."""
    description: Mapping[str, Any]
    """name, fingerprint, dtype, adapter; of a program its format too."""
    device: str

    @classmethod
    def of_model(
        cls, model: BloomForCausalLM, tokenizer: Tokenizer, *, name: str, adapter: str | None, mesh: Mesh = ALONE
    ) -> "Subject":
        """A loaded model; every rank must make this call.

        Args:
            model: to evaluate.
            tokenizer: the model's.
            name: of the model, for the report.
            adapter: name or path of the adapter that the model was loaded with.
            mesh: the ranks.
        """
        weight = model.transformer.word_embeddings.weight
        description = {
            "name": name,
            "fingerprint": model_fingerprint(model, mesh),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "adapter": adapter,
        }
        return cls(model=model, tokenizer=tokenizer, mesh=mesh, description=description, device=str(weight.device))

    @classmethod
    def of_program(cls, program: Program, mesh: Mesh = ALONE) -> "Subject":
        """An opened program; each rank opens it, and the ranks share its mapped weights."""
        manifest = program.manifest
        description = {
            "name": str(program.path),
            "fingerprint": manifest.fingerprint,
            "dtype": manifest.dtype if manifest.quantization == "none" else manifest.quantization,
            "adapter": None,
            "program": manifest.format,
        }
        return cls(model=program.model, tokenizer=program.tokenizer, mesh=mesh, description=description, device="cpu")
