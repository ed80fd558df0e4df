"""Program: an exported model with its tokenizer, which completes texts."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ProgramError
from bloomlm.generation.config import GenerationConfig
from bloomlm.generation.generate import Completion, OnToken, complete, generate
from bloomlm.runtime.formats import FORMATS
from bloomlm.runtime.manifest import Manifest


class Program:
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
        self.tokenizer = Tokenizer.from_directory(directory)
        self._check_tokenizer(directory)
        self.model = form.open(self.manifest, directory, prefix)

    def generate(
        self, prompts: str | Sequence[str], *, batch_size: int = 8, src_length: int | None = None, **options: Any
    ) -> list[Completion]:
        """Complete prompts.

        Args:
            prompts: one text or several.
            batch_size: number of prompts computed at once; it changes the speed only.
            src_length: the most tokens of a prompt; the end of a longer one is dropped. None: no cut.
            options: see bloomlm.GenerationConfig.from_options; the manifest has the default of max_new_tokens.

        Returns:
            num_return_sequences completions of the first prompt, then of the second, and so on.

        Raises:
            GenerationError: an empty prompt, an unknown option, or one without effect.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        config = GenerationConfig.from_options(**{"max_new_tokens": self.manifest.max_new_tokens, **options})
        return list(self.completions(texts, config, batch_size=batch_size, src_length=src_length))

    def completions(
        self,
        prompts: Sequence[str],
        config: GenerationConfig,
        *,
        batch_size: int = 8,
        src_length: int | None = None,
        num_done: int = 0,
        on_token: OnToken | None = None,
    ) -> Iterator[Completion]:
        """Complete prompts batch by batch; see bloomlm.generation.generate.complete."""
        return complete(
            partial(generate, self.model),
            self.tokenizer,
            prompts,
            config,
            batch_size=batch_size,
            src_length=src_length,
            num_done=num_done,
            on_token=on_token,
        )

    def _check_tokenizer(self, directory: Path) -> None:
        if self.tokenizer.fingerprint != self.manifest.tokenizer:
            raise ProgramError(
                f"{directory} holds another tokenizer than the program was exported with; copy the tokenizer's files "
                "of the same export, or export programs with different tokenizers into directories of their own"
            )
