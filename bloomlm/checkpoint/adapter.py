"""An adapter from whatever files it lies in: PEFT's or PaddleNLP's."""

from pathlib import Path

from bloomlm.checkpoint.paddle.adapter import find_paddle_adapter, install_paddle_adapter, read_paddle_adapter
from bloomlm.checkpoint.paddle.prefix import PrefixLayout
from bloomlm.checkpoint.peft import CONFIG_FILE
from bloomlm.checkpoint.peft import load_adapter as load_peft_adapter
from bloomlm.errors import AdapterError
from bloomlm.model.bloom import BloomForCausalLM


def load_adapter(
    model: BloomForCausalLM,
    directory: Path,
    *,
    prefix_layout: PrefixLayout | None = None,
    trained_tensor_parallel_degree: int | None = None,
) -> None:
    """Install an adapter into its base model; where a directory holds both kinds of files, PEFT's are read.

    Args:
        model: the base model, without an adapter.
        directory: the adapter.
        prefix_layout: PaddleNLP's prefix only: how its keys and values lie; None: as the files tell.
        trained_tensor_parallel_degree: PaddleNLP's adapters only: ranks that trained it; None: as the files tell.

    Raises:
        AdapterError: files are missing, damaged or do not fit the model, or leave open what they mean.
    """
    if not (directory / CONFIG_FILE).is_file() and find_paddle_adapter(directory):
        adapter = read_paddle_adapter(
            directory,
            model.config,
            prefix_layout=prefix_layout,
            trained_tensor_parallel_degree=trained_tensor_parallel_degree,
        )
        install_paddle_adapter(model, adapter)
        return
    if prefix_layout is not None or trained_tensor_parallel_degree is not None:
        raise AdapterError(
            f"{directory} holds no adapter in PaddleNLP's files; leave out prefix_layout and "
            "trained_tensor_parallel_degree, which say how to read those"
        )
    load_peft_adapter(model, directory)
