"""Runs lm-eval's tasks on a loaded model and brings its results into a report's form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError
from bloomlm.evaluation.evaluated import Evaluated
from bloomlm.evaluation.lm_eval_adapter import BloomLM
from bloomlm.evaluation.metrics import Metric
from bloomlm.evaluation.plan import Protocol
from bloomlm.evaluation.protocols.lm_eval import SEQ_LENGTH
from bloomlm.parallel.mesh import ALONE, Mesh

BOOTSTRAP_ITERS = 1000
"""Resamples behind those standard errors that have no formula."""


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """What lm-eval gave."""

    metrics: Mapping[str, Metric]
    """`task metric` -> result; a filter other than none is named in brackets."""
    counts: Mapping[str, float]
    max_length: int
    protocol: Protocol


def run_tasks(
    model: Evaluated,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    batch_size: int,
    max_length: int | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
    mesh: Mesh = ALONE,
) -> TaskResults:
    """Run tasks.

    Args:
        model, tokenizer: to evaluate.
        tasks: names that lm-eval knows, or those in include_path.
        batch_size: sequences of max_length at once.
        max_length: most tokens the model sees; None: lm-eval's own for BLOOM.
        limit: documents of each task, from the first; None: all.
        num_fewshot: worked examples before each question; None: the task's own.
        include_path: directory with more tasks.
        mesh: the ranks, all of which must come here; all get all results.

    Raises:
        ConfigError: a task is not known, or its data cannot be had.
    """
    import lm_eval  # an extra; that it is there, the adapter has made sure
    from lm_eval.tasks import TaskManager

    length = max_length or SEQ_LENGTH
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(f"--tasks: lm-eval knows no {', '.join(unknown)}; `lm-eval ls tasks` lists what it knows")
    language_model = BloomLM(model, tokenizer=tokenizer, batch_size=batch_size, max_length=length, mesh=mesh)
    try:
        results = lm_eval.simple_evaluate(
            model=language_model,
            tasks=list(tasks),
            limit=limit,
            num_fewshot=num_fewshot,
            task_manager=manager,
            bootstrap_iters=BOOTSTRAP_ITERS,
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise ConfigError(f"--tasks {','.join(tasks)}: the data could not be fetched from the hub ({error})") from error
    counts = {f"{task} examples": sizes["effective"] for task, sizes in results["n-samples"].items()}
    protocol = Protocol(name="lm_eval tasks", version=lm_eval.__version__, source="lm-evaluation-harness")
    return TaskResults(metrics=_metrics(results), counts=counts, max_length=length, protocol=protocol)


def _metrics(results: Mapping[str, Any]) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            name, _, filter_name = key.partition(",")
            if not filter_name or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{name}_stderr,{filter_name}")
            shown = f"{task} {name}" + ("" if filter_name == "none" else f" [{filter_name}]")
            metrics[shown] = Metric(
                value=float(value),
                standard_error=float(error) if isinstance(error, (int, float)) else None,
                higher_is_better=bool(results["higher_is_better"].get(task, {}).get(name, True)),
            )
    return metrics
