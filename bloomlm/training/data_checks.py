"""Checks of the flags that name data, before it is read and once its form is known."""

from pathlib import Path

from bloomlm.data.example import TrainingSet
from bloomlm.data.mixture import Mixture
from bloomlm.data.text_sources import MIXTURE_SUFFIXES
from bloomlm.errors import ConfigError
from bloomlm.training.config import TrainingConfig
from bloomlm.training.evaluate_text import BITS_PER_BYTE, text_metric_names
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


def is_text_metric(name: str) -> bool:
    """Whether only raw text can have a metric of this name, which text_metric_names lists."""
    return name == BITS_PER_BYTE or ("/" in name and name.partition("/")[0] in ("eval_loss", BITS_PER_BYTE))


def check_best_metric(examples: TrainingSet, evaluation: EvaluationPlan) -> None:
    """Check that the metric that chooses the best checkpoint is computed of these examples."""
    metric = evaluation.best_metric
    if not is_text_metric(metric):
        return
    if not isinstance(examples, Mixture):
        raise ConfigError(
            f"--metric_for_best_model {metric} is computed of raw text, and {examples.name} has {examples.unit} of "
            "other rows; choose another metric, for example eval_loss"
        )
    known = text_metric_names(examples)
    if metric not in known:
        raise ConfigError(f"--metric_for_best_model {metric}; the evaluation of this text has {', '.join(known)}")


def check_texts(data: DataPlan, evaluation: EvaluationPlan) -> None:
    """Check that no flag asks for answers to the prompts that evaluated raw text does not have."""
    if evaluation.scores_answers or evaluation.num_written_answers > 0:
        raise ConfigError(
            f"--do_generation and --generate_num answer prompts, and {data.name} is raw text, which has none; leave "
            "them out, or give rows that have prompts as --eval_file"
        )
