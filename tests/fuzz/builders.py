"""Small valid files of every kind, written by bloomlm, by torch, by Python's pickler in Paddle's form, or by PaddleNLP."""

import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import yaml

import bloomlm.export.formats.pt2
from bloomlm.adapters.base import Adapter
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.api import load
from bloomlm.checkpoint.adapters.convert import convert_adapter, open_adapter_conversion
from bloomlm.checkpoint.formats import FileForm
from bloomlm.checkpoint.reader import load_model
from bloomlm.checkpoint.writer import write_model
from bloomlm.data.chat_template import PLAIN_TEMPLATE
from bloomlm.data.token_files import MANIFEST_FILE, PROGRESS_FILE, file_inputs, load_token_files
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.data.windows import TextWindows
from bloomlm.errors import BloomlmError
from bloomlm.export.program import export_program
from bloomlm.model.config import BloomConfig
from bloomlm.runtime.manifest import describe_file, manifest_checksum
from bloomlm.training.config import TrainingConfig
from bloomlm.training.finetune import finetune
from bloomlm.vocabulary.new_tokens import write_new_tokens
from tests.bloom_tokenizer import make_tokenizer
from tests.paddle_files import State, cut, paddle_state, variable_names, write
from tests.paddle_fixtures import FIXTURES
from tests.tiny_bloom import write_adapter
from tests.tiny_checkpoint import random_model

Build = Callable[[Path], object]
"""Fills an empty directory."""

TOKENIZER = make_tokenizer()
# 2 ranks divide the vocabulary and the heads.
CONFIG = BloomConfig(vocab_size=TOKENIZER.vocab_size + 6, hidden_size=24, n_layer=2, n_head=6)
BASE = "base"
"""Directory beside the templates with the base model of all adapters and runs."""
ROWS = [
    {"src": "the cat and the dog", "tgt": "sat on a mat"},
    {"src": "中文 text, with commas", "tgt": 'and "quotes"'},
    {"src": "a", "tgt": "b\nc"},
    {"src": "one two three", "tgt": "four"},
]
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the cat and 中文"},
    {"role": "assistant", "content": "sat on a mat"},
]
MESSAGES = [
    {"messages": CONVERSATION},
    {"messages": [*CONVERSATION, *CONVERSATION[1:]], "id": 3},
    {"messages": CONVERSATION[1:]},
]
SHARED = [
    {
        "conversations": [{"from": "human", "value": "the dog"}, {"from": "gpt", "value": "one two"}],
        "system": "Be brief.",
    },
    {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b\nc"}]},
]
PREFERENCES = [{"prompt": row["src"], "chosen": row["tgt"], "rejected": row["tgt"][::-1]} for row in ROWS]
CHAT_PREFERENCES = [
    {"prompt": CONVERSATION[:2], "chosen": CONVERSATION[2:], "rejected": [{"role": "assistant", "content": text}]}
    for text in ("a mat", "one two")
]
JUDGED = [{"prompt": row["src"], "completion": row["tgt"], "label": number % 2 == 0} for number, row in enumerate(ROWS)]
TEXT = "the cat and the dog sat on a mat .\n\n中文 text, and more of it\n" * 8
RUN_FLAGS = {
    "max_steps": 2,
    "save_steps": 1,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "device": "cpu",
}


def write_base(directory: Path) -> Path:
    model(directory)
    (directory / "train.jsonl").write_text(jsonl(ROWS))
    (directory / "text.txt").write_text(TEXT)
    return directory


def model(directory: Path, **options: int) -> None:
    """Hugging Face's files; options as of write_model."""
    directory.mkdir(parents=True, exist_ok=True)
    network = random_model(CONFIG)
    write_model(directory, network.config, network.named_parameters(), **options)
    TOKENIZER.save(directory)


def torch_model(directory: Path, *, zipped: bool, sharded: bool = False) -> None:
    """pytorch_model.bin, in today's archive or in the form before torch 1.6."""
    model(directory)
    state = {name: tensor.clone() for name, tensor in load_model(directory).state_dict().items()}
    (directory / "model.safetensors").unlink()
    names = list(state)
    parts = [names[:9], names[9:]] if sharded else [names]
    files = [f"pytorch_model-{i}.bin" for i in range(len(parts))] if sharded else ["pytorch_model.bin"]
    for file, part in zip(files, parts, strict=True):
        torch.save({name: state[name] for name in part}, directory / file, _use_new_zipfile_serialization=zipped)
    if sharded:
        places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def paddle_model(
    directory: Path, protocol: int = 4, degree: int = 1, name: str = "model_state.tp{:02}.pdparams"
) -> None:
    """model_state.pdparams, or one file for each rank."""
    model(directory)
    (directory / "model.safetensors").unlink()
    state: State = paddle_state(random_model(CONFIG))
    for rank in range(degree):
        content = dict(cut(state, degree, rank) if degree > 1 else state)
        names = {"StructuredToParameterName@@": variable_names(CONFIG)}
        write(directory / (name.format(rank) if degree > 1 else "model_state.pdparams"), content | names, protocol)


def copied(*paths: str, files: Iterable[str] = ("*",)) -> Build:
    """Files of the fixtures that PaddleNLP wrote."""

    def build(directory: Path) -> None:
        for path in paths:
            for pattern in files:
                for found in (FIXTURES / path).glob(pattern):
                    if found.is_file() and found.suffix != ".npy":
                        shutil.copyfile(found, directory / found.name)

    return build


def adapter(config: Adapter) -> Build:
    return lambda directory: write_adapter(fresh(directory), directory.parent / BASE, config)


def torch_adapter(directory: Path) -> None:
    """adapter_model.bin."""
    adapter(LoraConfig(r=2))(directory)
    from bloomlm.checkpoint.safetensors_file import SafetensorsFile

    file = SafetensorsFile(directory / "adapter_model.safetensors")
    torch.save({name: file.read(name).clone() for name in file.entries}, directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()


def paddle_adapter(config: Adapter, degree: int = 1) -> Build:
    """An adapter in PaddleNLP's files, as `bloomlm convert` writes it."""

    def build(directory: Path) -> None:
        source = write_adapter(directory.parent / f"{directory.name}-source", directory.parent / BASE, config)
        conversion = open_adapter_conversion(
            source, FileForm.PADDLE, tensor_parallel_degree=degree, base_model_name_or_path=str(directory.parent / BASE)
        )
        convert_adapter(conversion, fresh(directory))

    return build


def run(**options: object) -> Build:
    """The directory of a run of two steps, with two checkpoints."""

    def build(directory: Path) -> None:
        base = directory.parent / BASE
        flags = {"model_name_or_path": str(base), "train_file": str(base / "train.jsonl"), "output_dir": str(directory)}
        finetune(TrainingConfig(**(flags | RUN_FLAGS | options)))  # type: ignore[arg-type]

    return build


def program(format: str) -> Build:
    """An exported program that is not compiled."""

    def build(directory: Path) -> None:
        loaded = load(directory.parent / BASE, dtype="float32")
        find, bloomlm.export.formats.pt2.find_compiler = bloomlm.export.formats.pt2.find_compiler, lambda: None
        try:
            path = directory / "bloom"
            export_program(loaded.model, loaded.tokenizer, path, source="fuzz", format=format, verify=False)
        finally:
            bloomlm.export.formats.pt2.find_compiler = find

    return build


def renew_checksums(directory: Path) -> None:
    """Edit the manifest of a program until it describes the files as they are; a manifest that is no JSON stays so."""
    path = directory / "bloom.json"
    try:
        values = json.loads(path.read_text())
        values.pop("checksum", None)
        values["files"] = {file.name: describe_file(file) for file in sorted(directory.glob("bloom.*")) if file != path}
        with suppress(BloomlmError):
            values["tokenizer"] = Tokenizer.from_directory(directory).fingerprint
        path.write_text(json.dumps({**values, "checksum": manifest_checksum(values)}))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return


def gpt2_tokenizer(directory: Path) -> None:
    TOKENIZER.save_with_gpt2_files(directory)
    (directory / "tokenizer.json").unlink()


def tokenizer(directory: Path) -> None:
    TOKENIZER.save(directory)
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )


def texts(name: str, text: str) -> Build:
    return lambda directory: (directory / name).write_text(text, encoding="utf-8")


def mixture(directory: Path) -> None:
    """Two sources, as --train_file reads them."""
    sources = []
    for name, weight in (("one", 0.7), ("two", 0.3)):
        (directory / f"{name}.txt").write_text(TEXT + name)
        sources.append({"name": name, "path": f"{name}.txt", "weight": weight, "language": "en"})
    (directory / "mixture.yaml").write_text(yaml.safe_dump(sources, sort_keys=False))


def windows(base: Path, directory: Path) -> TextWindows:
    """Windows of the base's text, whose token files are in a directory."""
    files = load_token_files(
        "texts", file_inputs(base / "text.txt"), TOKENIZER, cache_dir=directory, show_progress=False
    )
    return TextWindows(files, 16)


def token_files(directory: Path, *, is_finished: bool = True) -> None:
    """The token files of the base's text, or those of a run that was stopped before it named them."""
    windows(directory.parent / BASE, directory)
    if not is_finished:
        (found,) = directory.iterdir()
        (found / MANIFEST_FILE).rename(found / PROGRESS_FILE)


def chat_template(directory: Path) -> None:
    (directory / "chat.jinja").write_text(PLAIN_TEMPLATE)


def parquet(directory: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({name: [row[name] for row in ROWS] for name in ROWS[0]})
    pyarrow.parquet.write_table(table, directory / "rows.parquet")


def jsonl(rows: Iterable[object]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def run_file(directory: Path) -> None:
    """The flags of a run, as --config reads them."""
    flags = {"model_name_or_path": "builtin:tiny", "train_file": "train.jsonl", "lora": True, "target_modules": None}
    values = flags | RUN_FLAGS | {"learning_rate": 1e-3, "r": 4, "output_dir": "out", "bf16": False, "sharding": ""}
    values = {name: value for name, value in values.items() if value is not None}
    (directory / "run.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def new_tokens(directory: Path) -> None:
    write_new_tokens(directory, range(250, 258))


def report(directory: Path) -> None:
    """A report of `bloomlm evaluate`, with its influences."""
    from bloomlm.evaluation.config import make_config
    from bloomlm.evaluation.evaluate import LoggedNotices, evaluate
    from bloomlm.evaluation.execution import Subject
    from bloomlm.evaluation.report import influences_path

    base = directory.parent / BASE
    (directory.parent / "wiki.valid.tokens").write_text("the cat and the dog sat on a mat .\n" * 20)
    loaded = load(base)
    options = {"eval_path": str(directory.parent / "wiki.valid.tokens"), "seq_length": 32}
    subject = Subject.of_model(loaded.model, loaded.tokenizer, name=loaded.name, adapter=None, mesh=loaded.mesh)
    result = evaluate(make_config(options), lambda: subject, mesh=loaded.mesh, display=LoggedNotices())
    result.save(directory / "report.json")
    assert influences_path(directory / "report.json").is_file()


def fresh(directory: Path) -> Path:
    """A directory that a writer creates itself."""
    shutil.rmtree(directory, ignore_errors=True)
    return directory


def paddle_program(directory: Path) -> None:
    """An exported Paddle program: .pdiparams and .pdiparams.info."""
    import struct

    model(directory)
    (directory / "model.safetensors").unlink()
    state, names = paddle_state(random_model(CONFIG)), variable_names(CONFIG)
    with (directory / "bloom.pdiparams").open("wb") as file:
        for structured in sorted(names, key=lambda name: names[name]):
            array = np.ascontiguousarray(state[structured])
            dims = b"".join(b"\x10" + varint(size) for size in array.shape)
            description = b"\x08\x05" + dims
            file.write(struct.pack("<IQIi", 0, 0, 0, len(description)) + description + array.tobytes())
    info = {variable: {"structured_name": structured} for structured, variable in names.items()}
    write(directory / "bloom.pdiparams.info", info)


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


LORA, PREFIX = LoraConfig(r=2, lora_alpha=4), PrefixConfig(num_prefix_tokens=3)
PROJECTED = PrefixConfig(num_prefix_tokens=3, prefix_projection=True)
