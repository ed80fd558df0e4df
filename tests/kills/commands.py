"""The commands that are killed: what they read, what they write, and how long-lived each of their files is."""

import json
from dataclasses import dataclass
from pathlib import Path

_RUN = (
    "finetune --model_name_or_path builtin:tiny --output_dir run --max_steps 6 --save_steps 2 --logging_steps 1 "
    "--per_device_train_batch_size 4 --learning_rate 1e-3 --disable_tqdm True --report_to none --device cpu"
)
_FINETUNE = f"{_RUN} --train_file ../inputs/train.jsonl --src_length 24 --tgt_length 16"
_BEST = (
    "--eval_file ../inputs/dev.jsonl --evaluation_strategy steps --eval_steps 2 --load_best_model_at_end True "
    "--save_total_limit 1"
)
LORA = f"{_FINETUNE} --lora True".replace("--output_dir run", "--output_dir ../inputs/lora")
"""Makes the adapter that the others read."""
_MODEL = "--model_name_or_path builtin:tiny"


@dataclass(frozen=True)
class Command:
    """A command, run in the directory work, beside the directory inputs."""

    name: str
    words: str
    older: str | None = None
    """A command that wrote an older output, which this one replaces."""
    output: str = "out"
    """File or directory that it writes, and that is old or new as a whole at every moment."""
    num_ranks: int = 1
    all_checkpoints: str | None = None
    """Flags with which a run keeps all its checkpoints."""

    @property
    def trains(self) -> bool:
        """Whether it is a run with checkpoints."""
        return self.all_checkpoints is not None


COMMANDS = (
    Command("finetune", f"{_FINETUNE} --save_total_limit 2", output="run", all_checkpoints="--save_total_limit 9"),
    Command(
        "finetune --lora",
        f"{_FINETUNE} {_BEST} --lora True --lora_dropout 0.1 --merge_weights True",
        output="run",
        all_checkpoints="--save_total_limit 9",
    ),
    Command(
        "finetune, raw text",
        f"{_RUN} --train_file ../inputs/text.txt --max_length 24 --save_total_limit 1",
        output="run",
        all_checkpoints="--save_total_limit 9",
    ),
    Command(
        "finetune, tp 2",
        f"{_FINETUNE} --save_total_limit 1 --tensor_parallel_degree 2",
        output="run",
        num_ranks=2,
        all_checkpoints="--save_total_limit 9",
    ),
    Command(
        "finetune, FSDP 2",
        f"{_FINETUNE} {_BEST} --sharding stage3",
        output="run",
        num_ranks=2,
        all_checkpoints="--save_total_limit 9",
    ),
    Command(
        "convert",
        "convert --input builtin:tiny --output out --dtype float16 --max_shard_size 300KB --verify True",
        older="convert --input builtin:tiny --output out",
    ),
    Command(
        "convert --to paddle",
        "convert --input builtin:tiny --output out --to paddle --tensor_parallel_degree 2",
        older="convert --input builtin:tiny --output out",
    ),
    Command(
        "merge",
        f"merge {_MODEL} --lora_path ../inputs/lora --output_path out --max_shard_size 300KB",
        older="convert --input builtin:tiny --output out",
    ),
    Command(
        "trim",
        f"trim {_MODEL} --corpus ../inputs/train.jsonl --keep_tokens 900 --output_path out",
        older="convert --input builtin:tiny --output out",
    ),
    Command("export", f"export {_MODEL} --format gguf --output_path out/bloom"),
    Command(
        "evaluate",
        f"evaluate {_MODEL} --eval_path ../inputs/text.txt --output_file out.json --batch_size 1 --seq_length 16",
        output="out.json",
        older=f"evaluate {_MODEL} --eval_path ../inputs/text.txt --output_file out.json --seq_length 32",
    ),
    Command(
        "predict",
        f"predict {_MODEL} --data_file ../inputs/train.jsonl --output_file out.jsonl --batch_size 1 --max_new_tokens 8",
        output="out.jsonl",
        older=f"predict {_MODEL} --data_file ../inputs/dev.jsonl --output_file out.jsonl --max_new_tokens 4",
    ),
)


def write_inputs(directory: Path) -> None:
    """Write what the commands read, except for the adapter."""
    directory.mkdir(parents=True)
    for name, count in (("train", 22), ("dev", 7)):
        rows = [{"src": f"{number} and {number + 3} make", "tgt": f"{2 * number + 3}"} for number in range(count)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "text.txt").write_text("The history of the world is long, and its end is open.\n" * 12)


def write_foreign(work: Path) -> dict[Path, tuple[bytes, int]]:
    """Write files of another program where the commands write; returns them with content and time of change."""
    found = {}
    for name in ("notes.txt", ".hidden", "sub/.bloomlm/data.bin", "run/mine.log", "run/.mine"):
        path = work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"not bloomlm's: {name}")
        found[path] = path.read_bytes(), path.stat().st_mtime_ns
    return found
