"""The gguf format, for llama.cpp and the programs built on it; written by the `gguf` package, a matrix at a time.

llama.cpp stores all queries of a block, then all keys, then all values; BLOOM stores them head by head. llama.cpp reads
the tokenizer's vocabulary and merges from the same file. Names and keys come from the tables of the `gguf` package and
from the BLOOM graph of llama.cpp.

Shapes: H heads, K head_dim, D hidden.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bloomlm.checkpoint.merge import merged_parameters
from bloomlm.data.gpt2_files import BLOOM_WORDS
from bloomlm.data.tokenizer_files import TOKENIZER_FILE
from bloomlm.errors import CheckpointError, ProgramError
from bloomlm.export.formats.base import ExportFormat, ExportJob
from bloomlm.export.weight_formats import nearest_int4
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.model.quantized import row_blocks
from bloomlm.parallel.layout import is_of_base
from bloomlm.runtime.formats.gguf import gguf_file

_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "query_key_value": "attn_qkv",
    "dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "dense_h_to_4h": "ffn_up",
    "dense_4h_to_h": "ffn_down",
}
_OUTER_NAMES = {
    "word_embeddings": "token_embd",
    "word_embeddings_layernorm": "token_embd_norm",
    "ln_f": "output_norm",
}
_QUANTIZED = {"int8": "Q8_0", "int4": "Q4_0"}
_PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_BLOCK_SIZE = 32
"""Neighbouring weights that share a scale in Q8_0 and Q4_0."""
_CONTEXT_TOKENS = 2048
"""Length of BLOOM's training sequences. The file must give a length, although ALiBi does not limit it."""


def _write(job: ExportJob, directory: Path) -> Mapping[str, Any]:
    """Write PREFIX.gguf with the model, LoRA added in, and its tokenizer."""
    gguf = _library()
    tokenizer = json.loads((directory / TOKENIZER_FILE).read_bytes())
    _check(job.model, tokenizer, job.quantization)
    kind = gguf.GGMLQuantizationType[_QUANTIZED.get(job.quantization) or _PLAIN[job.dtype]]
    file_type = "ALL_F32" if kind.name == "F32" else f"MOSTLY_{kind.name}"
    writer = gguf.GGUFWriter(directory / gguf_file(job.prefix), "bloom")
    _add_sizes(writer, job.model.config, Path(job.source).name, gguf.LlamaFileType[file_type])
    _add_tokenizer(writer, gguf.TokenType, tokenizer, job.model.config)
    _add_tensor_infos(writer, gguf, job.model, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    on_parameter = job.count_parameters()
    for name, merged in merged_parameters(job.model, torch.float32):
        tensor = _laid_out(name, merged.detach().float(), job.model.config)
        form = _form(gguf, tensor, kind)
        writer.write_tensor_data(_q4_0(name, tensor) if form.name == "Q4_0" else gguf.quantize(tensor.numpy(), form))
        on_parameter()
    writer.close()
    return {}


GGUF = ExportFormat(name="gguf", write=_write, has_virtual_tokens=False, float32_limits="llama.cpp")


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ProgramError(
            "--format gguf needs the gguf package; install it with pip install 'bloomlm[gguf]'"
        ) from error
    return gguf


def _check(model: BloomForCausalLM, tokenizer: Mapping[str, Any], quantization: str) -> None:
    """Raise ProgramError where llama.cpp cannot hold the model or its tokenizer."""
    if model.config.apply_residual_connection_post_layernorm:
        raise ProgramError(
            "llama.cpp's BLOOM has residuals before the layer norm only, and this model has them after it "
            "(apply_residual_connection_post_layernorm); export it as --format pt2"
        )
    if quantization != "none" and model.config.hidden_size % _BLOCK_SIZE:
        raise ProgramError(
            f"llama.cpp quantises {_BLOCK_SIZE} neighbouring weights together, and rows of this model have "
            f"{model.config.hidden_size}; export it with --quantization none"
        )
    steps = tokenizer.get("pre_tokenizer") or {}
    patterns = [step.get("pattern", {}).get("Regex") for step in steps.get("pretokenizers", [steps])]
    if BLOOM_WORDS not in patterns or tokenizer.get("model", {}).get("type") != "BPE":
        raise ProgramError(
            "the tokenizer does not split texts as BLOOM's does, but llama.cpp would; export it as --format pt2"
        )


def _add_tensor_infos(writer: Any, gguf: Any, model: BloomForCausalLM, kind: Any) -> None:
    """Add the names, shapes and types of all tensors, which the file holds before their data."""
    for name, parameter in model.named_parameters():
        if not is_of_base(name):
            continue
        form = _form(gguf, parameter, kind)
        shape = gguf.quant_shape_to_byte_shape(tuple(parameter.shape), form)
        # the library expects the shape in bytes for quantised tensors, and in numbers for others
        in_bytes = form.name in (*_QUANTIZED.values(), "BF16")
        size = int(np.prod(shape, dtype=np.int64))
        item = np.dtype(np.uint8 if in_bytes else np.float16 if form.name == "F16" else np.float32)
        writer.add_tensor_info(_tensor_name(name), shape if in_bytes else tuple(parameter.shape), item, size, form)


def _form(gguf: Any, tensor: Tensor, kind: Any) -> Any:
    """The type of a stored tensor: `kind` for matrices, fp32 for vectors."""
    return kind if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32


def _add_sizes(writer: Any, config: BloomConfig, name: str, file_type: Any) -> None:
    writer.add_name(name)
    writer.add_context_length(int(config.extra.get("seq_length") or _CONTEXT_TOKENS))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(file_type)


def _add_tokenizer(writer: Any, token_type: Any, tokenizer: Mapping[str, Any], config: BloomConfig) -> None:
    tokens = {number: text for text, number in tokenizer["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, token_type.NORMAL)
    for added in tokenizer.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = token_type.CONTROL if added["special"] else token_type.USER_DEFINED
    ids = range(config.vocab_size)  # the embedding may have more rows than there are tokens
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("bloom")
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in ids])
    writer.add_token_types([kinds.get(number, token_type.UNUSED) for number in ids])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_bos_token(False)
    for kind in ("bos", "eos", "unk", "pad"):
        token_id = getattr(config, f"{kind}_token_id")
        if token_id is not None:
            getattr(writer, f"add_{kind}_token_id")(token_id)


def _tensor_name(name: str) -> str:
    *path, module, kind = name.removeprefix("transformer.").split(".")
    if path[:1] == ["h"]:
        return f"blk.{path[1]}.{_BLOCK_NAMES[module]}.{kind}"
    return f"{_OUTER_NAMES[module]}.{kind}"


def _laid_out(name: str, tensor: Tensor, config: BloomConfig) -> Tensor:
    """A tensor as llama.cpp expects it: rows (head, 3, head_dim) of query_key_value become (3, head, head_dim)."""
    if ".query_key_value." not in name:
        return tensor
    return tensor.unflatten(0, (config.n_head, 3, config.head_dim)).transpose(0, 1).flatten(0, 2).contiguous()


def _q4_0(name: str, matrix: Tensor) -> np.ndarray[Any, Any]:
    """A matrix in Q4_0. The library's scales always span the largest weight of a group, which has larger errors.

    A group of 32 neighbours is a scale in float16 and 16 bytes. Byte j holds weight j in the low half and weight j + 16
    in the high half, each plus 8.
    """
    rows = []
    for block in row_blocks(matrix):
        groups = matrix[block].unflatten(1, (-1, _BLOCK_SIZE))
        if not torch.isfinite(groups).all():
            raise CheckpointError(f"{name} holds NaN or infinite numbers, so it cannot be rounded to int4")
        numbers, scales = nearest_int4(groups, lambda scale: scale.half().float())
        low, high = (numbers + 8).to(torch.uint8).chunk(2, dim=2)
        rows.append(torch.cat((scales.half()[..., None].view(torch.uint8), low | high << 4), dim=2).flatten(1))
    return torch.cat(rows).numpy()
