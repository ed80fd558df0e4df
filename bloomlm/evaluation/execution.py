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
    """How a plan is run.

    Attributes:
        subject: to evaluate.
        batch_size: windows of the longest length, or prompts, at once.
        finished: the results of a stopped run, to which this one's are added; None: nothing is kept.
        display: shows the progress.
    """

    subject: Subject
    batch_size: int
    finished: ResumableResults | None
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
        """All results of a run, in their order: those of a stopped run, and those of all copies of the model.

        Args:
            batches: takes the numbers that are finished and yields this copy's share of the others, batch by batch.
            total: how many results there are.
            encode, decode: a result to the fields of a JSON object, and back.
            summary: makes a function that is given results batch by batch and describes all of them so far.

        Returns:
            The results, and how many of them a stopped run left.

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
