"""How files of PaddleNLP are to be read where they do not say it themselves."""

from dataclasses import dataclass
from enum import Enum

from bloomlm.errors import ConfigError


class PrefixLayout(Enum):
    """How a block's part of a prefix becomes its keys and values; see prefix.py."""

    OLD = "old"
    NEW = "new"


@dataclass(frozen=True, kw_only=True)
class PaddleReading:
    """What the user knows about files of PaddleNLP that the files do not say."""

    prefix_layout: PrefixLayout | None = None
    """Of a prefix adapter: old until August 2023, new since then; None: as the files say."""
    trained_tensor_parallel_degree: int | None = None
    """Tensor-parallel ranks that trained an adapter; None: as the files say."""
    tokenization: bool = False
    """Read vocab.json and merges.txt as PaddleNLP did, which cut words like GPT-2's tokenizer and not like BLOOM's."""

    @classmethod
    def from_flags(
        cls,
        *,
        prefix_layout: str | None = None,
        trained_tensor_parallel_degree: int | None = None,
        paddle_tokenization: bool = False,
    ) -> "PaddleReading":
        """The value that three flags of these names stand for.

        Raises:
            ConfigError: there is no such prefix_layout.
        """
        layouts = {layout.value: layout for layout in PrefixLayout}
        if prefix_layout is not None and prefix_layout not in layouts:
            raise ConfigError(f"prefix_layout is {prefix_layout!r}; expected one of {', '.join(layouts)}")
        return cls(
            prefix_layout=None if prefix_layout is None else layouts[prefix_layout],
            trained_tensor_parallel_degree=trained_tensor_parallel_degree,
            tokenization=paddle_tokenization,
        )

    @property
    def adapter_flags(self) -> tuple[str, ...]:
        """Names of the given flags that say how to read an adapter."""
        return tuple(
            name for name in ("prefix_layout", "trained_tensor_parallel_degree") if getattr(self, name) is not None
        )


AS_THE_FILES_TELL = PaddleReading()
