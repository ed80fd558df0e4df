"""`bloomlm finetune`: trains a BLOOM on examples, fully or with an adapter."""

from bloomlm.cli.options import config_command
from bloomlm.training.config import TrainingConfig


def run(config: TrainingConfig) -> None:
    """Fine-tune. SIGTERM makes the run save and exit with the status of a process that the signal ended.

    Raises:
        BloomlmError: flags, files or data that cannot be used, or a run that cannot go on.
    """
    # Here, because they import torch, and --help or a misspelt flag should not wait for that.
    from bloomlm.training.finetune import finetune
    from bloomlm.training.loop import SIGTERM_EXIT_CODE

    if finetune(config).interrupted:
        raise SystemExit(SIGTERM_EXIT_CODE)


command = config_command(
    "finetune",
    TrainingConfig,
    run,
    has_ranks=True,
    help="""Train a BLOOM on your examples: fully, with LoRA or with prefix tuning.

    Everything that the run makes is written to --output_dir. The same command resumes a stopped run from its newest
    checkpoint. The first example takes a minute or two on a CPU; the second needs eight GPUs.

    \b
    bloomlm finetune --model_name_or_path builtin:tiny --dataset_name_or_path builtin:dates \\
        --lora --r 8 --learning_rate 1e-3 --num_train_epochs 1 --logging_steps 10 --output_dir runs/dates
    bloomlm finetune --num_processes 8 --model_name_or_path bigscience/bloom-7b1 --train_file train.jsonl \\
        --bf16 --recompute --sharding stage3 --output_dir runs/7b1
    """,
)
