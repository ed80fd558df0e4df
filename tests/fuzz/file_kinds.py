"""The table of file kinds: how a small valid one is built, how a user's command opens it, and what that may raise."""

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from bloomlm.adapters.dora import DoraConfig
from bloomlm.api import load
from bloomlm.checkpoint.adapters.convert import convert_adapter, open_adapter_conversion
from bloomlm.checkpoint.convert import convert_model, open_model_conversion
from bloomlm.checkpoint.formats import FileForm
from bloomlm.cli.options import config_flags, join_values
from bloomlm.cli.prompts import PromptFlags
from bloomlm.data.chat_template import PLAIN_TEMPLATE, ChatTemplate, read_chat_template
from bloomlm.data.conversations import load_conversations
from bloomlm.data.examples import load_examples
from bloomlm.data.files import FileRows
from bloomlm.data.message_answers import holds_messages, load_message_answers
from bloomlm.data.preferences import AnswerPairs, Answers, ComparedSet, JudgedAnswers, load_text_answers
from bloomlm.data.text_sources import load_mixture, read_mixture, sources_of_path
from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import BloomlmError, CheckpointError, ConfigError, DataError, ProgramError
from bloomlm.evaluation.data_sources import read_passages
from bloomlm.evaluation.report import compare, read_report
from bloomlm.files.yaml_text import read_yaml
from bloomlm.parallel.mesh import ALONE
from bloomlm.runtime import Program
from bloomlm.serving.http.service import find_chat_template
from bloomlm.training.config import TrainingConfig
from bloomlm.training.finetune import TrainingRun
from bloomlm.training.output_dir import prepare
from bloomlm.training.report import MetricsFile
from bloomlm.training.resolve import Machine, resolve
from bloomlm.training.results import read_train_results
from bloomlm.training.setup import set_up
from bloomlm.vocabulary.new_tokens import read_new_tokens
from tests.fuzz import builders
from tests.fuzz.builders import BASE, LORA, PREFIX, PROJECTED, ROWS, RUN_FLAGS, Build
from tests.paddle_fixtures import FIXTURES
from tests.short_runs import shorten_runs

Open = Callable[[Path, Path, Path], object]
"""Opens the damaged files, given their directory, the templates' directory and a path for results."""


@dataclass(frozen=True, kw_only=True)
class FileKind:
    """A row of the table."""

    name: str
    build: Build
    open: Open
    raises: tuple[type[BloomlmError], ...]
    """What a damaged file of this kind may raise."""
    damages: tuple[str, ...] = ("*",)
    """Patterns of the files that are damaged."""
    named_by: tuple[str, ...] = ()
    """What an error may name instead of the file."""
    weight: int = 1
    """Share of the mutations."""
    is_slow: bool = False
    """Whether building or opening it takes seconds, so that `make test` leaves it out."""
    repair: Callable[[Path], object] | None = None
    """Gives damaged files the checksums that belong to them, so that what stands behind the checksums is reached. Such
    files must come from someone whom the user trusts, so nothing is promised, and they are damaged only on request."""


def complete(directory: Path, templates: Path, out: Path) -> None:
    """Load a model, read every weight and write a token."""
    loaded = load(directory)
    for parameter in loaded.model.parameters():
        parameter.detach().float().sum()
    loaded.generate(["the cat"], max_new_tokens=1)


def convert(form: FileForm, directory: Path, templates: Path, out: Path) -> None:
    """`bloomlm convert` of a model."""
    conversion = open_model_conversion(directory, form, dtype=torch.float32)
    convert_model(conversion, out, tokenizer=Tokenizer.from_directory(directory))


def complete_adapted(directory: Path, templates: Path, out: Path, **options: str) -> None:
    """Load a model with an adapter and write a token."""
    load(templates / BASE, adapter_path=directory, **options).generate(["the cat"], max_new_tokens=1)


def convert_adapted(form: FileForm, directory: Path, templates: Path, out: Path) -> None:
    """`bloomlm convert` of an adapter, without its base model."""
    convert_adapter(open_adapter_conversion(directory, form), out)


def resume(directory: Path, templates: Path, out: Path, **options: object) -> None:
    """`bloomlm finetune` up to its first step, in the directory of an earlier run."""
    base = templates / BASE
    flags = {"model_name_or_path": str(base), "train_file": str(base / "train.jsonl"), "output_dir": str(directory)}
    plan = resolve(TrainingConfig(**(flags | RUN_FLAGS | options)), Machine.here())  # type: ignore[arg-type]
    checkpoint = prepare(plan.output, trains=True)
    setup = set_up(plan, checkpoint, Console(quiet=True), ALONE)
    assert setup.plan.training is not None
    TrainingRun(setup, setup.plan.training).reporter.close()
    read_train_results(directory)


def resume_paddle(directory: Path, templates: Path, out: Path, **options: object) -> None:
    """The same, from a checkpoint of PaddleNLP."""
    checkpoint = directory.rename(directory.with_name("checkpoint-4"))
    model = str(FIXTURES / "models/bloom_h64_l3_a4")
    resume(
        out, templates, out, model_name_or_path=model, resume_from_checkpoint=str(checkpoint), max_steps=5, **options
    )


def read_tokenizer(directory: Path, templates: Path, out: Path) -> None:
    """Encode and decode, and prepare the chat template as `bloomlm serve` does."""
    tokenizer = Tokenizer.from_directory(directory)
    tokenizer.decode(tokenizer.encode("the cat, and 中文 </s>"))
    tokenizer.encode_batch(["", "the"])
    assert tokenizer.has_byte_decoder in (True, False)
    find_chat_template(None, tokenizer)
    out.mkdir()
    tokenizer.save(out)


def run_program(directory: Path, templates: Path, out: Path) -> None:
    """`bloomlm infer`, one token."""
    Program(directory / "bloom").generate(["the cat"], max_new_tokens=1)


def read_examples(name: str, directory: Path, templates: Path, out: Path) -> None:
    """Examples to train on, and prompts to predict."""
    load_examples(directory / name, builders.TOKENIZER, src_length=8, tgt_length=8, cache_dir=out, show_progress=False)
    PromptFlags(data_file=str(directory / name)).read_prompts()


def read_conversations(directory: Path, templates: Path, out: Path) -> None:
    """Conversations to train on."""
    tokenizer = builders.TOKENIZER.with_chat_template(PLAIN_TEMPLATE)
    load_conversations(directory / "rows.jsonl", tokenizer, max_length=64, cache_dir=out, show_progress=False)


def read_comparisons(form: type[ComparedSet], directory: Path, templates: Path, out: Path) -> None:
    """Answers that are preferred to others, or judged."""
    rows = FileRows(directory / "rows.jsonl")
    options = {"cache_dir": out, "show_progress": False}
    chatty = builders.TOKENIZER.with_chat_template(PLAIN_TEMPLATE)
    first = next(iter(rows.rows()), None)

    def load(fields: tuple[str, ...]) -> Answers:
        if first is not None and holds_messages(first.fields):
            return load_message_answers(rows, chatty, fields=fields, max_length=64, **options)
        return load_text_answers(rows, builders.TOKENIZER, fields=fields, src_length=8, tgt_length=8, **options)

    for _ in form.load(rows, load):
        pass


def read_texts(name: str, directory: Path, templates: Path, out: Path) -> None:
    """Raw text to train on."""
    mixture = load_mixture(sources_of_path(directory / name), builders.TOKENIZER, 16, show_progress=False)
    for number in range(min(len(mixture), 50)):
        mixture[number]


def read_mixed_texts(directory: Path, templates: Path, out: Path) -> None:
    """A mixture; it may name any directory of this machine, and whole ones are not read here."""
    path = directory / "mixture.yaml"
    sources = read_mixture(path)
    if not any(entry["path"] in ("/", "~", ".", "..", "") for entry in read_yaml(path)):
        load_mixture(sources, builders.TOKENIZER, 16, show_progress=False)


def read_token_files(directory: Path, templates: Path, out: Path) -> None:
    """Raw text whose token files are damaged."""
    windows = builders.windows(templates / BASE, directory)
    learned = sum(
        stop - start - 1 for window in map(windows.__getitem__, range(len(windows))) for start, stop in window.learned
    )
    assert learned + len(windows) >= windows.num_supervised_tokens > 0


def use_chat_template(directory: Path, templates: Path, out: Path) -> None:
    """A template that `--chat_template` names."""
    template = ChatTemplate(read_chat_template(str(directory / "chat.jinja")), builders.TOKENIZER.special_tokens)
    template.render(builders.CONVERSATION, add_generation_prompt=True)
    template.render_with_answers(builders.CONVERSATION)


def read_cached(directory: Path, templates: Path, out: Path) -> None:
    """Examples whose cache is damaged."""
    rows = templates / BASE / "train.jsonl"
    examples = load_examples(
        rows, builders.TOKENIZER, src_length=8, tgt_length=8, cache_dir=directory, show_progress=False
    )
    assert [examples[i].source_text for i in range(len(examples))] == [row["src"] for row in ROWS]


def read_config_file(directory: Path, templates: Path, out: Path) -> None:
    """`bloomlm finetune --config run.yaml` up to the plan of the run."""
    values = join_values(config_flags(TrainingConfig), {}, directory / "run.yaml")
    resolve(TrainingConfig(**values), Machine.here())


def follow_metrics(directory: Path, templates: Path, out: Path) -> None:
    """Append to the log of a run that resumes."""
    file = MetricsFile(directory / "metrics.jsonl", step=1)
    file.write({"step": 2, "loss": 1.0})
    file.close()


def read_reports(directory: Path, templates: Path, out: Path) -> None:
    """`bloomlm evaluate --compare_with`."""
    found = read_report(directory / "report.json")
    compare(found, read_report(templates / "evaluation report" / "report.json"))


def write_cache(directory: Path) -> None:
    load_examples(
        directory.parent / BASE / "train.jsonl",
        builders.TOKENIZER,
        src_length=8,
        tgt_length=8,
        cache_dir=directory,
        show_progress=False,
    )


MODEL_ERRORS = (CheckpointError, ConfigError)
METRICS = builders.jsonl({"step": step, "loss": 2.5 / step, "epoch": step / 4} for step in (1, 2, 3))
CSV = 'src,tgt\nthe cat,sat\n"with, comma","and ""quotes"" and\na line"\n中文,é\n'
WEIGHTS = ("*.safetensors", "*.index.json")
BIN = ("*.bin", "*.bin.index.json")
PADDLE = ("*.pdparams", "*.pdparams.index.json", "auto_dist*")
AUTO_DIST = "autodist/bloom_h64_l3_a4_tp2_static_names"
HF, PD = FileForm.HUGGING_FACE, FileForm.PADDLE
Row = partial(FileKind, raises=MODEL_ERRORS)

KINDS: tuple[FileKind, ...] = (
    Row(name="safetensors", build=builders.model, open=complete, damages=WEIGHTS, weight=3),
    Row(
        name="safetensors shards",
        build=partial(builders.model, max_shard_size_bytes=20_000),
        open=complete,
        damages=("*.index.json", "*.safetensors"),
        weight=2,
    ),
    Row(name="safetensors, converted", build=builders.model, open=partial(convert, PD), weight=2),
    Row(name="config.json", build=builders.model, open=complete, damages=("config.json",), weight=3),
    Row(name="torch .bin", build=partial(builders.torch_model, zipped=True), open=complete, damages=BIN, weight=3),
    Row(name="torch .bin of 2020", build=partial(builders.torch_model, zipped=False), open=complete, damages=BIN),
    Row(
        name="torch .bin shards",
        build=partial(builders.torch_model, zipped=True, sharded=True),
        open=complete,
        damages=BIN,
    ),
    Row(name="pdparams", build=builders.paddle_model, open=complete, damages=PADDLE, weight=3),
    Row(name="pdparams, protocol 2", build=partial(builders.paddle_model, protocol=2), open=complete, damages=PADDLE),
    Row(name="pdparams, converted", build=builders.paddle_model, open=partial(convert, HF), weight=2),
    Row(name="pdparams of ranks", build=partial(builders.paddle_model, degree=2), open=complete, damages=PADDLE),
    Row(
        name="pdparams shards",
        build=builders.copied("models/bloom_h64_l3_a4_p261_sharded", "tokenizer_v512"),
        open=complete,
        damages=PADDLE,
    ),
    Row(name="auto_dist", build=builders.copied(AUTO_DIST), open=complete, damages=PADDLE),
    Row(name="pdiparams", build=builders.paddle_program, open=complete, damages=("*.pdiparams*",), weight=2),
    Row(name="PEFT LoRA", build=builders.adapter(LORA), open=complete_adapted, weight=3),
    Row(name="PEFT DoRA", build=builders.adapter(DoraConfig(r=2)), open=complete_adapted),
    Row(name="PEFT prefix", build=builders.adapter(PROJECTED), open=complete_adapted, weight=2),
    Row(name="PEFT LoRA .bin", build=builders.torch_adapter, open=complete_adapted),
    Row(name="PEFT LoRA, converted", build=builders.adapter(LORA), open=partial(convert_adapted, PD), weight=2),
    Row(name="Paddle LoRA", build=builders.paddle_adapter(LORA), open=complete_adapted, weight=2),
    Row(name="Paddle LoRA of ranks", build=builders.paddle_adapter(LORA, 2), open=complete_adapted),
    Row(
        name="Paddle LoRA, converted", build=builders.paddle_adapter(LORA), open=partial(convert_adapted, HF), weight=2
    ),
    Row(
        name="Paddle prefix",
        build=builders.paddle_adapter(PREFIX),
        open=partial(complete_adapted, prefix_layout="new"),
        weight=2,
    ),
    Row(name="tokenizer.json", build=builders.tokenizer, open=read_tokenizer, weight=3),
    Row(name="vocab.json and merges.txt", build=builders.gpt2_tokenizer, open=read_tokenizer, weight=2),
    Row(
        name="checkpoint of a full run",
        build=builders.run(),
        open=resume,
        damages=(
            "metrics.jsonl",
            "run.yaml",
            "checkpoint-2/*",
            "checkpoint-2/training_state/*",
            "checkpoint-2/training_state/.metadata",
        ),
        weight=3,
    ),
    Row(
        name="checkpoint of a LoRA run",
        build=builders.run(lora=True, r=2),
        open=partial(resume, lora=True, r=2),
        damages=(
            "metrics.jsonl",
            "run.yaml",
            "checkpoint-2/*",
            "checkpoint-2/training_state/*",
            "checkpoint-2/training_state/.metadata",
        ),
        weight=3,
    ),
    Row(
        name="PaddleNLP run",
        build=builders.copied("checkpoints/ft_A_lora/checkpoint-4"),
        open=partial(resume_paddle, lora=True),
        weight=2,
    ),
    Row(
        name="JSONL rows",
        build=builders.texts("rows.jsonl", builders.jsonl(ROWS)),
        open=partial(read_examples, "rows.jsonl"),
        raises=(DataError,),
        weight=2,
    ),
    Row(
        name="JSON rows",
        build=builders.texts("rows.json", builders.json.dumps(ROWS)),
        open=partial(read_examples, "rows.json"),
        raises=(DataError,),
        weight=2,
    ),
    Row(
        name="CSV rows",
        build=builders.texts("rows.csv", CSV),
        open=partial(read_examples, "rows.csv"),
        raises=(DataError,),
        weight=2,
    ),
    Row(
        name="Parquet rows",
        build=builders.parquet,
        open=partial(read_examples, "rows.parquet"),
        raises=(DataError,),
        weight=2,
    ),
    Row(
        name="LAMBADA",
        build=builders.texts("passages.jsonl", builders.jsonl({"text": row["src"]} for row in ROWS)),
        open=lambda d, t, o: read_passages(d / "passages.jsonl"),
        raises=(DataError,),
    ),
    *(
        Row(
            name=name,
            build=builders.texts("rows.jsonl", builders.jsonl(rows)),
            open=action,
            raises=(DataError,),
            weight=2,
        )
        for name, rows, action in (
            ("messages", builders.MESSAGES, read_conversations),
            ("ShareGPT", builders.SHARED, read_conversations),
            ("preferences", builders.PREFERENCES, partial(read_comparisons, AnswerPairs)),
            ("preferences of messages", builders.CHAT_PREFERENCES, partial(read_comparisons, AnswerPairs)),
            ("judged answers", builders.JUDGED, partial(read_comparisons, JudgedAnswers)),
            ("rows of text", [{"text": row["src"]} for row in ROWS], partial(read_texts, "rows.jsonl")),
        )
    ),
    Row(
        name="raw text",
        build=builders.texts("text.txt", builders.TEXT),
        open=partial(read_texts, "text.txt"),
        raises=(DataError,),
    ),
    Row(
        name="mixture",
        build=builders.mixture,
        open=read_mixed_texts,
        raises=(DataError,),
        damages=("*.yaml", "*.yaml", "*.txt"),
        weight=2,
    ),
    Row(
        name="token files",
        build=builders.token_files,
        open=read_token_files,
        raises=(DataError,),
        damages=("*/*.json", "*/*"),
        weight=2,
    ),
    Row(
        name="token files, unfinished",
        build=partial(builders.token_files, is_finished=False),
        open=read_token_files,
        raises=(DataError,),
        damages=("*/*.json", "*/*"),
    ),
    Row(
        name="chat template",
        build=builders.chat_template,
        open=use_chat_template,
        raises=(ConfigError, DataError),
        named_by=("chat template",),
        weight=3,
    ),
    Row(name="cache of examples", build=write_cache, open=read_cached, raises=()),
    Row(
        name="--config",
        build=builders.run_file,
        open=read_config_file,
        raises=(ConfigError,),
        named_by=("--", "LoRA's r"),
        weight=3,
    ),
    Row(
        name="metrics.jsonl",
        build=builders.texts("metrics.jsonl", METRICS),
        open=follow_metrics,
        raises=(CheckpointError,),
        weight=2,
    ),
    Row(
        name="new_tokens.json",
        build=builders.new_tokens,
        open=lambda d, t, o: read_new_tokens(d),
        raises=(CheckpointError,),
    ),
    Row(
        name="evaluation report",
        build=builders.report,
        open=read_reports,
        raises=(DataError, ConfigError),
        named_by=("--compare",),
        weight=2,
    ),
    *(
        Row(
            name=f"program {kind}",
            build=builders.program(kind),
            open=run_program,
            raises=(ProgramError, CheckpointError),
            is_slow=True,
        )
        for kind in ("pt2", "onnx", "gguf")
    ),
    *(
        Row(
            name=f"program {kind}, new checksums",
            build=builders.program(kind),
            open=run_program,
            raises=(ProgramError, CheckpointError),
            is_slow=True,
            repair=builders.renew_checksums,
        )
        for kind in ("pt2", "onnx", "gguf")
    ),
)


def build_templates(root: Path, kinds: tuple[FileKind, ...]) -> None:
    """Write a valid one of each kind into root/NAME, and the base model into root/base; open each, undamaged.

    What is imported and compiled on the way, the processes that are forked later have already.
    """
    builders.write_base(root / BASE)
    os.environ["BLOOMLM_CACHE"] = str(root / "cache")
    shorten_runs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in kinds:
            directory, copy = root / kind.name, root / "copy"
            directory.mkdir()
            kind.build(directory)
            shutil.copytree(directory, copy / "given")
            kind.open(copy / "given", root, copy / "out")
            shutil.rmtree(copy)
