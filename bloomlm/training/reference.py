"""Log-probabilities of answers under the reference model: the model that a run starts from, without an adapter.

They are computed once, before training, and kept in the cache directory. So no run needs a second model in memory or a
second forward pass, and runs that differ in adapter, beta or learning rate share them.
"""

import gc
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from bloomlm.data.answer_batch import collate_answers
from bloomlm.data.cache import read_arrays, write_arrays
from bloomlm.data.example import Example
from bloomlm.data.preferences import ComparedSet, Scores
from bloomlm.files.cache_directory import default_cache_dir
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.launch import agreed
from bloomlm.parallel.mesh import Mesh
from bloomlm.training.objectives.preference import score_answers
from bloomlm.training.precision import Precision
from bloomlm.training.run_plan import RunPlan
from bloomlm.version import __version__

BATCH_TOKENS = 4096
"""Number of tokens of a batch; a longer answer forms a batch alone."""


def with_reference(
    sets: Sequence[ComparedSet],
    plan: RunPlan,
    source: Path,
    load: Callable[[], BloomForCausalLM],
    console: Console,
    mesh: Mesh,
) -> list[ComparedSet]:
    """The same answers with their log-probabilities under the reference model; every rank must call this.

    Args:
        sets: answers of training and of evaluation.
        plan: plan of the run.
        source: directory of the reference model.
        load: loads the reference model, divided among the ranks; called if the cache lacks log-probabilities.
        console: where progress is shown.
        mesh: the ranks.
    """
    model: BloomForCausalLM | None = None
    found = []
    for answers in sets:
        path = default_cache_dir() / "reference" / f"{_cache_key(answers, plan, source)}.safetensors"
        cached = read_arrays(path)
        if agreed(cached is None, mesh):
            model = model or load()
            start = time.perf_counter()
            bar = console if plan.data.show_progress and console.is_terminal else None
            cached = {"log_probs": reference_scores(model, answers, plan.precision, mesh, bar)}
            line = (
                f"reference: log-probabilities of {cached['log_probs'].size:,} answers from {answers.name} under "
                f"{plan.model.name_or_path} in {time.perf_counter() - start:.1f} s; kept in {path.parent}"
            )
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            if mesh.is_main:
                write_arrays(path, cached)
        assert cached is not None
        found.append(answers.with_reference(cached["log_probs"]))
    del model
    gc.collect()  # under FSDP its modules refer to each other, and the model to train is loaded next
    return found


def reference_scores(
    model: BloomForCausalLM, answers: ComparedSet, precision: Precision, mesh: Mesh, console: Console | None = None
) -> Scores:
    """[len, 2] log-probabilities of each answer and of the other one; every rank gets all.

    Args:
        model: the reference model, divided among the ranks.
        answers: what is scored.
        precision: number formats, as in training.
        mesh: the ranks.
        console: where a bar is shown; None: nowhere.
    """
    device = next(model.parameters()).device
    flat: list[Example] = [answer for compared in answers for answer in (compared, compared.other)]
    scores = torch.zeros(len(flat), dtype=torch.float64, device=device)
    model.eval()
    with torch.no_grad():
        batches, degree = _batches(flat), mesh.degrees.dp
        batches += [[]] * (-len(batches) % degree)  # every rank takes part equally often
        for chosen in track(batches[mesh.dp_rank :: degree], "reference", console=console, disable=console is None):
            batch = collate_answers([flat[index] for index in chosen]).to(device)
            scores[chosen] = score_answers(model, batch, precision).answers
    mesh.sum_over(scores, ("dp_replicate", "dp_shard"))
    found: Scores = scores.view(-1, 2).cpu().numpy()
    return found


def _batches(answers: Sequence[Example]) -> list[list[int]]:
    """Numbers of answers of similar lengths, batch by batch, the longest first."""
    batches: list[list[int]] = []
    room = 0
    for index in sorted(range(len(answers)), key=lambda index: -len(answers[index].tokens)):
        length = len(answers[index].tokens) - 1
        if not batches or length > room:
            batches.append([])
            room = BATCH_TOKENS
        batches[-1].append(index)
        room -= length
    return batches


def _cache_key(answers: ComparedSet, plan: RunPlan, source: Path) -> str:
    """Digest of everything that the log-probabilities depend on; a file of the model counts by its size and time."""
    digest = hashlib.sha256()
    for compared in answers:
        for answer in (compared, compared.other):
            digest.update(repr(answer.learned).encode())
            digest.update(answer.tokens.tobytes())
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.iterdir())
    computation = replace(plan.model, name_or_path="", recompute=False, noise_alpha=0.0, compiles_blocks=False)
    digest.update(repr((str(source.resolve()), files, computation, plan.precision)).encode())
    digest.update(repr((__version__, torch.__version__)).encode())
    return digest.hexdigest()[:40]
