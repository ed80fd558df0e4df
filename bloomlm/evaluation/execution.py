"""What an evaluation is run on (a model or a program), how many windows at once, and what is shown and kept."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from bloomlm.checkpoint.fingerprint import model_fingerprint
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.evaluation.scoring.batches import join_shares
from bloomlm.files.resumable import ResumableResults
from bloomlm.generation.language_model import LanguageModel
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.runtime.program import Program

R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model or an exported program, with its tokenizer and what the report says about it."""

    model: LanguageModel
    tokenizer: Tokenizer
    mesh: Mesh
    """The ranks, which share the model or have copies of it."""
    description: Mapping[str, Any]
    """name, fingerprint, dtype, adapter, and the format of a program."""
    device: str

    @classmethod
    def of_model(
        cls, model: BloomForCausalLM, tokenizer: Tokenizer, *, name: str, adapter: str | None, mesh: Mesh = ALONE
    ) -> "Subject":
        """A loaded model; every rank must make this call. The report names the model and its adapter."""
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


class Display(Protocol):
    """Shows how an evaluation goes; called on every rank."""

    def notice(self, text: str) -> None:
        """Show something that the user should know."""
        ...

    def progress(self, num_done: int, total: int, result: str) -> None:
        """Show how many windows or answers are finished, and the result so far in a few words."""
        ...


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a plan is run."""

    subject: Subject
    batch_size: int
    """Windows of the maximum length, or prompts, at once."""
    finished: ResumableResults | None
    """The results of a stopped run, to which this run adds its own; None: nothing is kept."""
    display: Display

    def collect(
        self,
        batches: Callable[[Collection[int]], Iterator[dict[int, R]]],
        total: int,
        *,
        encode: Callable[[R], Mapping[str, Any]],
        decode: Callable[[Mapping[str, Any]], R],
        summary: Callable[[], Callable[[Collection[R]], str]],
    ) -> tuple[list[R], int]:
        """Compute the results that a stopped run has not left, and return all results on every rank.

        Args:
            batches: takes the numbers of finished results and yields this copy's share of the others, batch by batch.
            total: number of results.
            encode, decode: turn a result into the fields of a JSON object, and back.
            summary: makes a function that takes results batch by batch and describes all of them so far.

        Returns:
            The results in their order, and how many of them a stopped run left.

        Raises:
            CheckpointError: the results cannot be written.
        """
        done = {} if self.finished is None else self.finished.done
        before = {number: decode(fields) for number, fields in done.items()}
        own: dict[int, R] = {}
        describe = summary()
        self.display.progress(len(before), total, describe(before.values()))
        for batch in batches(before.keys()):
            own |= batch
            if self.finished is not None:
                self.finished.add({number: encode(result) for number, result in batch.items()})
            # the other copies have finished about as many
            num_done = len(before) + len(own) * self.subject.mesh.degrees.dp
            text = describe(batch.values())
            if num_done < total:
                self.display.progress(num_done, total, text)
        results = before | join_shares(own, self.subject.mesh)
        self.display.progress(total, total, summary()(results.values()))
        return [results[number] for number in range(total)], len(before)
