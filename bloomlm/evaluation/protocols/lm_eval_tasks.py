"""Any tasks of lm-eval, which it runs on the model. Needs the `lm_eval` extra."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bloomlm.data.tokenizer import Tokenizer
from bloomlm.errors import ConfigError
from bloomlm.evaluation.execution import Execution
from bloomlm.evaluation.metrics import Metric
from bloomlm.evaluation.protocol import Definition, Outcome, Plan, Protocol, Task, WindowOptions
from bloomlm.flags import flag

BOOTSTRAP_ITERS = 1000
"""Resamples for those standard errors that have no formula."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions(WindowOptions):
    """What lm-eval is to run."""

    tasks: tuple[str, ...] = flag(
        "lm-eval", (), "tasks of lm-eval to run, e.g. arc_easy,piqa (pip install 'bloomlm[lm_eval]')"
    )
    num_fewshot: int | None = flag(
        "lm-eval", None, "examples with answers before each question  [default: as the task defines]", minimum=0
    )
    include_path: Path | None = flag("lm-eval", None, "directory with definitions of more tasks")


@dataclass(frozen=True, kw_only=True)
class TaskPlan(Plan):
    """A plan that lm-eval carries out; nothing is kept of a stopped run, because all results come at the end."""

    tasks: Sequence[str]
    manager: Any
    """lm-eval's TaskManager, which knows the tasks."""

    def run(self, execution: Execution) -> Outcome:
        """Run the tasks.

        Raises:
            ConfigError: the data of a task cannot be fetched.
        """
        import lm_eval

        from bloomlm.evaluation.lm_eval_adapter import BloomLM

        subject = execution.subject
        started = time.perf_counter()
        language_model = BloomLM(
            subject.model,
            tokenizer=subject.tokenizer,
            batch_size=execution.batch_size,
            max_length=self.settings["max_length"],
            mesh=subject.mesh,
        )
        try:
            results = lm_eval.simple_evaluate(
                model=language_model,
                tasks=list(self.tasks),
                limit=self.settings["limit"],
                num_fewshot=self.settings["num_fewshot"],
                task_manager=self.manager,
                bootstrap_iters=BOOTSTRAP_ITERS,
            )
        except (ConnectionError, FileNotFoundError) as error:
            raise ConfigError(f"--tasks {self.task}: the data could not be fetched from the hub ({error})") from error
        return Outcome(
            metrics=_metrics(results),
            run={"seconds": time.perf_counter() - started},
            counts={f"{task} examples": sizes["effective"] for task, sizes in results["n-samples"].items()},
        )


def plan_tasks(
    data: None,
    tokenizer: Tokenizer,
    *,
    tasks: Sequence[str],
    seq_length: int,
    num_fewshot: int | None,
    include_path: Path | None,
    limit: int | None,
) -> TaskPlan:
    """Find the tasks.

    Args:
        data, tokenizer: not used; lm-eval fetches the data, and the tokenizer comes with the model.
        tasks: names that lm-eval or include_path defines.
        seq_length: maximum tokens that the model sees at once.
        num_fewshot: examples with answers before each question; None: as the task defines.
        include_path: directory with definitions of more tasks.
        limit: number of documents of each task, from the first; None: all.

    Raises:
        ConfigError: lm-eval is not installed, or does not know a task.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(f"--tasks: lm-eval knows no {', '.join(unknown)}; `lm-eval ls tasks` lists what it knows")
    return TaskPlan(
        definition=Definition(name="lm_eval tasks", version=lm_eval.__version__, source="lm-evaluation-harness"),
        task=",".join(tasks),
        settings={"num_fewshot": num_fewshot, "max_length": seq_length, "limit": limit},
        counts={},
        tasks=tasks,
        manager=manager,
    )


def _metrics(results: Mapping[str, Any]) -> dict[str, Metric]:
    """`task metric` -> result; a filter other than none is named in brackets."""
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


PROTOCOL = Protocol(
    name="lm_eval_tasks",
    help="any tasks of lm-eval",
    tasks=(Task(name="tasks", make_plan=plan_tasks, options=TaskOptions),),
    reads_file=False,
)
