"""Checks of the flags that name data, before it is read and once its form is known."""

from pathlib import Path

from bloomlm.data.text_sources import MIXTURE_SUFFIXES
from bloomlm.errors import ConfigError
from bloomlm.training.config import TrainingConfig
from bloomlm.training.run_plan import DataPlan, EvaluationPlan

_TRAINING_DATA = ("train_file", "mixture", "dataset_name_or_path")


def check_data(config: TrainingConfig) -> None:
    """Check that the flags name the training data once, and a mixture as such."""
    given = [f"--{name}" for name in _TRAINING_DATA if getattr(config, name)]
    if len(given) > 1:
        both = "both" if len(given) == 2 else "all"
        raise ConfigError(f"{' and '.join(given)} {both} name training data; give one of them")
    if config.train_file and Path(config.train_file).suffix in MIXTURE_SUFFIXES:
        raise ConfigError(f"--train_file {config.train_file}: a file that names several sources is given as --mixture")


def check_texts(data: DataPlan, evaluation: EvaluationPlan) -> None:
    """Check that no flag asks for answers to the prompts that evaluated raw text does not have."""
    if evaluation.scores_answers or evaluation.num_written_answers > 0:
        raise ConfigError(
            f"--do_generation and --generate_num answer prompts, and {data.name} is raw text, which has none; leave "
            "them out, or give rows that have prompts as --eval_file"
        )
