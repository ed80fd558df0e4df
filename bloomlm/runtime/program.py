"""Program: an exported model with its tokenizer, which completes texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ProgramError
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.generate import Generation, OnToken, generate
from bloomlm.generation.text import TextGenerator
from bloomlm.runtime.formats import FORMATS
from bloomlm.runtime.manifest import Manifest


class Program(TextGenerator):
    """An exported program, opened.

    Args:
        path: directory and prefix, as given to bloomlm export, for example inference/bloom.
        backend: the library that runs it; "auto" takes the one for its format.
        verify_weights: read all weights and compare their checksums first.

    Raises:
        ProgramError: there is no such program, or it is damaged or cannot run here.
        BackendMissingError: the library that would run it is not installed.
        CheckpointError: its tokenizer is missing or damaged.
    """

    tokenizer: Tokenizer

    def __init__(self, path: str | Path, *, backend: str = "auto", verify_weights: bool = False) -> None:
        self.path = path = Path(path)
        directory, prefix = path.parent, path.name
        manifest_path = directory / f"{prefix}.json"
        self.manifest = Manifest.read(manifest_path)
        form = FORMATS.get(self.manifest.format)
        if form is None:
            raise ProgramError(
                f"{manifest_path} is damaged: format {self.manifest.format!r} is none of {', '.join(FORMATS)}"
            )
        if backend not in ("auto", form.backend):
            raise ProgramError(
                f"{path} is a program in the format {self.manifest.format}, which backend {backend} does not run; "
                "leave --backend at auto"
            )
        large_file = form.large_file(prefix)
        self.manifest.check_files(directory, hash_file=lambda name: verify_weights or name != large_file)
        self.model = form.open(self.manifest, directory, prefix)  # first: a thread goes on with it
        self.tokenizer = Tokenizer.from_directory(directory)
        self._check_tokenizer(directory)

    def _default_options(self) -> dict[str, Any]:
        return {"max_new_tokens": self.manifest.max_new_tokens}

    def _continue(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        *,
        on_token: OnToken | None,
        first_sequence: int,
        prompt_lookup: int,
    ) -> list[Generation]:
        decode = self.tokenizer.decode
        return generate(
            self.model,
            prompts,
            config,
            on_token=on_token,
            decode_text=decode,
            first_sequence=first_sequence,
            prompt_lookup=prompt_lookup,
        )

    def _check_tokenizer(self, directory: Path) -> None:
        if self.tokenizer.fingerprint != self.manifest.tokenizer:
            raise ProgramError(
                f"{directory} holds another tokenizer than the program was exported with; copy the tokenizer's files "
                "of the same export, or export programs with different tokenizers into directories of their own"
            )
