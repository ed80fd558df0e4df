"""Find, read and load an adapter, in PEFT's files or in PaddleNLP's."""

import warnings
from dataclasses import replace
from pathlib import Path

from bloomlm.adapters.bank import AdapterBank
from bloomlm.checkpoint.adapters.base_config import peft_base_config
from bloomlm.checkpoint.adapters.peft import CONFIG_FILE, PlainAdapter, install_adapter, read_peft_adapter
from bloomlm.checkpoint.paddle import importer
from bloomlm.checkpoint.paddle.importer import AS_THE_FILES_TELL, ForeignReading
from bloomlm.errors import AdapterError
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.parallel.layout import is_of_base, tp_part
from bloomlm.parallel.mesh import ALONE, Mesh
from bloomlm.parallel.tensor_parallel import cut_adapter


def find_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter, in PEFT's files or in PaddleNLP's."""
    return (directory / CONFIG_FILE).is_file() or importer.find_adapter(directory)


def adapter_base_config(directory: Path) -> BloomConfig:
    """The shape of an adapter's base model as far as the adapter's own files record it; see base_config.py.

    Raises:
        AdapterError: files are missing or damaged, or do not record the sizes.
    """
    is_peft = (directory / CONFIG_FILE).is_file()
    return peft_base_config(directory) if is_peft else importer.adapter_base_config(directory)


def load_adapter(
    model: BloomForCausalLM,
    directory: Path,
    *,
    reading: ForeignReading = AS_THE_FILES_TELL,
    mesh: Mesh = ALONE,
) -> None:
    """Install an adapter into its base model; where a directory holds both kinds of files, PEFT's are read.

    Args:
        model: the base model, without an adapter.
        directory: the adapter.
        reading: what PaddleNLP's files do not record; an error if the files are PEFT's.
        mesh: the ranks among which the model is cut (not sharded), each of which reads the adapter and takes its part.

    Raises:
        AdapterError: files are missing or damaged, do not fit the model, or do not record how they are to be read.
    """
    adapter = read_adapter(directory, model.config, reading)
    # the model is divided already, so the base model's parameters that the adapter brings (biases) must be too
    of_base = [name for name in adapter.tensors if is_of_base(name)]
    own = {name: tp_part(name, mesh.tp_rank, mesh.degrees.tp).of(adapter.tensors[name]) for name in of_base}
    adapter = replace(adapter, tensors={**adapter.tensors, **own})
    install_adapter(model, adapter)
    cut_adapter(model, mesh)


def load_named_adapter(
    bank: AdapterBank,
    name: str,
    directory: Path,
    *,
    reading: ForeignReading = AS_THE_FILES_TELL,
    mesh: Mesh = ALONE,
) -> None:
    """Load an adapter beside others, by a name that rows choose it by.

    Args:
        bank: the adapters of the base model.
        name: the name, which no other adapter in the bank has.
        directory, reading, mesh: as for load_adapter.

    Raises:
        AdapterError: as load_adapter, or the name is taken, or the adapter cannot be used beside others.
    """
    model = bank.base_model()
    load_adapter(model, directory, reading=reading, mesh=mesh)
    bank.load(name, model)


def read_adapter(
    directory: Path, model_config: BloomConfig, reading: ForeignReading = AS_THE_FILES_TELL
) -> PlainAdapter:
    """Read an adapter of a base model, as load_adapter does.

    Raises:
        AdapterError: as load_adapter.
    """
    is_peft, is_paddle = (directory / CONFIG_FILE).is_file(), importer.find_adapter(directory)
    if is_peft and is_paddle:
        warnings.warn(
            f"{directory} holds an adapter in PEFT's files and one in PaddleNLP's; PEFT's is read, the other is not",
            stacklevel=2,
        )
    if is_paddle and not is_peft:
        return importer.read_adapter(directory, model_config, reading)
    if reading.adapter_flags:
        raise AdapterError(
            f"{directory} is not read as an adapter in PaddleNLP's files; leave out "
            f"{' and '.join(reading.adapter_flags)}, which say how to read those"
        )
    return read_peft_adapter(directory, model_config)
