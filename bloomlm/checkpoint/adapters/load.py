"""An adapter from whatever files it lies in: PEFT's or PaddleNLP's."""

import warnings
from dataclasses import replace
from pathlib import Path

from bloomlm.checkpoint.adapters.peft import CONFIG_FILE, PlainAdapter, install_adapter, read_peft_adapter
from bloomlm.checkpoint.paddle.adapter import find_paddle_adapter, plain_adapter, read_paddle_adapter
from bloomlm.checkpoint.paddle.prefix import PrefixLayout
from bloomlm.errors import AdapterError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.parallel.layout import is_of_base, tp_part
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.parallel.tensor_parallel import cut_adapter


def find_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter, in PEFT's files or in PaddleNLP's."""
    return (directory / CONFIG_FILE).is_file() or find_paddle_adapter(directory)


def load_adapter(
    model: BloomForCausalLM,
    directory: Path,
    *,
    prefix_layout: PrefixLayout | None = None,
    trained_tensor_parallel_degree: int | None = None,
    mesh: Mesh = ALONE,
) -> None:
    """Install an adapter into its base model; where a directory holds both kinds of files, PEFT's are read.

    Args:
        model: the base model, without an adapter.
        directory: the adapter.
        prefix_layout: PaddleNLP's prefix only: how its keys and values lie; None: as the files tell.
        trained_tensor_parallel_degree: PaddleNLP's adapters only: ranks that trained it; None: as the files tell.
        mesh: the ranks among which the model is cut (not sharded), each of which reads the adapter and takes its part.

    Raises:
        AdapterError: files are missing, damaged or do not fit the model, or leave open what they mean.
    """
    adapter = read_adapter(
        directory,
        model.config,
        prefix_layout=prefix_layout,
        trained_tensor_parallel_degree=trained_tensor_parallel_degree,
    )
    # the model is cut already, and so must be those of its own parameters that the adapter brings
    of_base = [name for name in adapter.tensors if is_of_base(name)]
    own = {name: tp_part(name, mesh.tp_rank, mesh.degrees.tp).of(adapter.tensors[name]) for name in of_base}
    adapter = replace(adapter, tensors={**adapter.tensors, **own})
    install_adapter(model, adapter)
    cut_adapter(model, mesh)


def read_adapter(
    directory: Path,
    model_config: BloomConfig,
    *,
    prefix_layout: PrefixLayout | None = None,
    trained_tensor_parallel_degree: int | None = None,
) -> PlainAdapter:
    """Read an adapter of a base model, as load_adapter does.

    Raises:
        AdapterError: as load_adapter.
    """
    is_peft, is_paddle = (directory / CONFIG_FILE).is_file(), find_paddle_adapter(directory)
    if is_peft and is_paddle:
        warnings.warn(
            f"{directory} holds an adapter in PEFT's files and one in PaddleNLP's; PEFT's is read, the other is not",
            stacklevel=2,
        )
    if is_paddle and not is_peft:
        adapter = read_paddle_adapter(
            directory,
            model_config,
            prefix_layout=prefix_layout,
            trained_tensor_parallel_degree=trained_tensor_parallel_degree,
        )
        return plain_adapter(adapter, model_config)
    if prefix_layout is not None or trained_tensor_parallel_degree is not None:
        raise AdapterError(
            f"{directory} is not read as an adapter in PaddleNLP's files; leave out prefix_layout and "
            "trained_tensor_parallel_degree, which say how to read those"
        )
    return read_peft_adapter(directory, model_config)
