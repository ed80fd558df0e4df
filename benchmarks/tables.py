"""Draws recorded results: the tables of docs/benchmarks.md between their markers, what is asked, and a picture.

A result is the content of a file in results/KIND OF PROCESSOR/: processor, date, commit, command, versions, note, and
rows: name -> its figures, one a round. In a cell stand the figures of all rounds.
"""

import json
import re
import statistics
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from jobs import JOBS, PEERS, Bound, Job

RESULTS = Path(__file__).parent / "results"
ROUNDING = 1e-5
"""A relative error below this is that of float32."""
Result = dict[str, Any]
Rounds = list[dict[str, float]]
Results = dict[str, dict[str, Result]]
"""Processor -> name of a job -> its result."""


def part(ours: float, peer: float) -> float:
    return ours / peer


def times_as_fast(ours: float, peer: float) -> float:
    """Of seconds."""
    return peer / ours


def part_of_error(ours: float, peer: float) -> float | None:
    """Nothing where the peer's is that of rounding alone."""
    return ours / peer if peer > ROUNDING else None


class Column(NamedTuple):
    """How a figure is shown, and how ours is compared with a peer's."""

    heading: str
    compare: Callable[[float, float], float | None] | None = None
    digits: int = 3


COLUMNS = {
    "tokens_per_second": Column("tokens/s", part),
    "later_tokens_per_second": Column("tokens/s, later epochs", part),
    "megabytes_per_second": Column("MB/s", part),
    "prefill_1": Column("prefill, 1 prompt", part),
    "prefill_8": Column("prefill, 8", part),
    "decode_1": Column("decode, 1", part),
    "decode_8": Column("decode, 8", part),
    "prefill_512": Column("prefill, 512", part),
    "seconds": Column("seconds", times_as_fast),
    "step_seconds": Column("seconds of a step", times_as_fast),
    "import_seconds": Column("import, s", times_as_fast),
    "load_seconds": Column("load, s", times_as_fast),
    "first_use_seconds": Column("first use, s", times_as_fast),
    "total_seconds": Column("whole, s", times_as_fast),
    "first_token_seconds": Column("first token, s", times_as_fast),
    "first_p50_ms": Column("first token, ms", times_as_fast),
    "between_p50_ms": Column("between tokens, ms", times_as_fast),
    "bits": Column("bits a weight"),
    "error": Column("error", part_of_error),
    "divergence": Column("divergence, nats", part),
    "perplexity": Column("perplexity", digits=5),
    "change": Column("its change", digits=2),
    "of_peak": Column("of the peak"),
    "bandwidth": Column("of the memory's speed"),
    "read_gb_per_second": Column("read, GB/s"),
    "billion_products_per_second": Column("billion products/s"),
    "file_gb": Column("files, GB"),
    "state_gb": Column("weights, gradients, optimizer, GB", part),
    "memory_gb": Column("memory of a step, GB", part),
    "own_memory_gb": Column("memory of its own, GB"),
    "peak_memory_gb": Column("peak memory, GB", part),
    "http_tokens_per_second": Column("over HTTP, tokens/s"),
    "session_tokens_per_second": Column("session alone"),
    "http_over_session": Column("ratio"),
    "chunk_ms": Column("a chunk, ms"),
    "usual_gap_ms": Column("usual gap, ms"),
    "longest_gap_ms": Column("longest gap, ms"),
    "longest_over_chunk_and_gap": Column("longest / (chunk + gap)"),
    "first_ms": Column("first request, ms"),
    "later_ms": Column("later ones, ms"),
    "times_sooner": Column("times sooner"),
    "base_tokens_per_second": Column("base, tokens/s"),
    "mixed_tokens_per_second": Column("mixed, tokens/s"),
    "mixed_over_base": Column("ratio"),
    "plain_tokens_per_second": Column("plain, tokens/s"),
    "lookup_tokens_per_second": Column("with lookup"),
    "lookup_over_plain": Column("ratio"),
    "sent_mb": Column("sent by a rank, MB a step", digits=5),
    "kernel_mb": Column("by the kernel", digits=5),
    "planned_mb": Column("plan", digits=5),
    "least_mb": Column("least", digits=5),
    "state_mb": Column("weights, gradients, optimizer, MB"),
    "planned_state_mb": Column("plan, MB"),
    "peak_mb": Column("peak, MB"),
    "planned_peak_mb": Column("plan of the peak, MB"),
    "reading": Column("reading, of the plain model's time"),
    "generating": Column("generating"),
    "requests": Column("requests"),
    "violations": Column("violations"),
    "half_mb": Column("memory at half time, MB"),
    "end_mb": Column("at the end, MB"),
}
"""Key of a figure -> its column, in this order; figures without one are recorded and not shown."""
PICTURED = ("tokens_per_second", "decode_1", "decode_8", "prefill_512", "prefill_8", "seconds")
"""Keys of the picture."""


def load_results(folder: Path = RESULTS) -> Results:
    """Every recorded result, the newest processors first."""
    found: Results = {}
    for path in sorted(folder.glob("*/*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(result["processor"], {})[path.stem] = result
    newest = {name: max(result["date"] for result in results.values()) for name, results in found.items()}
    return {name: found[name] for name in sorted(found, key=lambda name: newest[name], reverse=True)}


def shown(value: float, digits: int = 3) -> str:
    """So many digits, or all of a larger whole number."""
    return f"{value:,.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"


def cell(figures: Rounds, key: str) -> str:
    """What was measured in each round; once, where it was always the same."""
    found = [shown(each[key], COLUMNS[key].digits) for each in figures if key in each]
    return ", ".join(found if len(set(found)) > 1 else found[:1])


def comparisons(job: Job, rows: dict[str, Rounds]) -> dict[tuple[str, str], Rounds]:
    """(our row, the peer's row) -> ratios by key; a pair of sides is compared at every point."""
    found = {}
    for ours, peer in job.pairs:
        for name in rows:
            point = name.removesuffix(ours)
            if name.endswith(ours) and (not point or point.endswith(", ")) and point + peer in rows:
                both = zip(rows[name], rows[point + peer], strict=False)
                found[name, point + peer] = [ratios(mine, theirs) for mine, theirs in both]
    return found


def compared(ours: str, peer: str) -> str:
    """The name of a comparison: `POINT, OURS : PEER`."""
    return f"{ours} : {peer.rpartition(', ')[2]}"


def ratios(ours: dict[str, float], peer: dict[str, float]) -> dict[str, float]:
    """By key: how many times as fast, or for memory and errors which part."""
    found = {
        key: column.compare(ours[key], peer[key])
        for key, column in COLUMNS.items()
        if column.compare and ours.get(key) and peer.get(key)
    }
    return {key: ratio for key, ratio in found.items() if ratio is not None}


def table(jobs: Sequence[Job], results: dict[str, Result]) -> list[str]:
    """The lines of a table: each job's rows, and in bold what compares them, below both."""
    lines: list[tuple[str, Rounds]] = []
    for job in jobs:
        rows = results[job.name]["rows"]
        start = f"{job.title}, " if job.title else ""
        waiting = comparisons(job, rows)
        for number, name in enumerate(rows, 1):
            lines.append((start + name, rows[name]))
            for ours, peer in [pair for pair in waiting if {*pair} <= {*list(rows)[:number]}]:
                lines.append((f"**{start}{compared(ours, peer)}**", waiting.pop((ours, peer))))
    keys = [key for key in COLUMNS if any(key in figures[0] for _, figures in lines)]
    head = ["", *(COLUMNS[key].heading for key in keys)]
    cells = [[name, *(cell(figures, key) for key in keys)] for name, figures in lines]
    return [row(head), row(["---"] * len(head)), *map(row, cells)]


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def section(name: str, results: Results) -> str:
    """Everything between a table's markers: for each kind of processor its versions, commands and table."""
    jobs = [job for job in JOBS if job.table == name]
    if not jobs:
        raise SystemExit(f"there is no table {name}; the tables are {', '.join(dict.fromkeys(j.table for j in JOBS))}")
    parts = []
    for processor, found in results.items():
        measured = [job for job in jobs if job.name in found]
        if not measured:
            continue
        versions: dict[str, None] = {}
        for job in measured:
            versions |= dict.fromkeys(
                f"{package} {version}" for package, version in found[job.name]["versions"].items()
            )
        commands = dict.fromkeys(f"    {origin(found[job.name])}" for job in measured)
        parts.append("\n".join([f"{processor}; {', '.join(versions)}:", "", *commands, "", *table(measured, found)]))
    return "\n\n".join(parts or ["Not measured yet."])


def origin(result: Result) -> str:
    """The command, when it ran, on what, and what was special."""
    words = [result["date"], *([f"commit {result['commit']}"] if result["commit"] else []), *result.get("notes", [])]
    return f"{result['command']}  # {', '.join(words)}"


def asked(results: Results) -> list[tuple[str, str, Bound, float]]:
    """(processor, job, bound, median of what was reached) of every bound that was measured."""
    found = []
    for processor, of_jobs in results.items():
        for job in (job for job in JOBS if job.name in of_jobs):
            rows = of_jobs[job.name]["rows"]
            ratios_of = comparisons(job, rows)
            for bound in job.bounds:
                rounds = rows.get(bound.row, []) if bound.peer is None else ratios_of.get((bound.row, bound.peer), [])
                values = [figures[bound.key] for figures in rounds if bound.key in figures]
                if values:
                    found.append((processor, job.name, bound, statistics.median(values)))
    return found


def asked_lines(results: Results) -> list[str]:
    """The same as a table for each kind of processor."""
    lines = []
    for processor, group in groupby(asked(results), key=lambda each: each[0]):
        lines += ["", f"{processor}:", "", row(["", "", "asked", "reached"]), row(["---"] * 4)]
        for _, job, bound, value in group:
            what = bound.row if bound.peer is None else compared(bound.row, bound.peer)
            reached = shown(value) if bound.holds(value) else f"**{shown(value)}**"
            lines.append(row([f"{job}, {what}", COLUMNS[bound.key].heading, str(bound), reached]))
    return lines[1:]


def draw_picture(path: Path, results: Results) -> None:
    """Ours over peers in speed, as bars, of the kind of processor with the most results."""
    from bloomlm.files.picture import new_figure, png_of, tidy

    if not results:
        return
    processor = max(results, key=lambda name: len(results[name]))
    bars = [
        (label(job, row, peer, key), statistics.median(each[key] for each in found if key in each))
        for job in JOBS
        if job.name in results[processor] and "--picture" not in job.command
        for (row, peer), found in comparisons(job, results[processor][job.name]["rows"]).items()
        for key in PICTURED
        if peer.rpartition(", ")[2].startswith(PEERS) and any(key in each for each in found)
    ]
    figure = new_figure(8, 0.6 + 0.2 * len(bars))
    axes = figure.subplots()
    places = range(len(bars))[::-1]
    colors = ["#2563a8" if value >= 1 else "#d1622b" for _, value in bars]
    axes.barh(places, [value for _, value in bars], color=colors, height=0.7)
    for place, (_, value) in zip(places, bars, strict=True):
        axes.text(value, place, f" {value:.2f}", va="center", fontsize=7)
    axes.set_yticks(places, [name for name, _ in bars], fontsize=7)
    axes.axvline(1, color="#333333", linewidth=0.8)
    axes.set(xlabel="times as fast as the peer", ylim=(-0.8, len(bars) - 0.2))
    axes.set_title(processor, fontsize=9)
    tidy(axes)
    path.write_bytes(png_of(figure))


def label(job: Job, row: str, peer: str, key: str) -> str:
    """What a bar of the picture is."""
    words = [job.table.replace("_", " "), job.title, compared(row, peer), COLUMNS[key].heading]
    return ", ".join(filter(None, words))


def redraw(text: str, results: Results) -> str:
    """The page with every table drawn anew."""

    def between(match: re.Match[str]) -> str:
        name = match[1]
        content = "\n".join(asked_lines(results)) if name == "asked" else section(name, results)
        return f"<!-- table: {name} -->\n\n{content}\n\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->.*?<!-- end -->", between, text, flags=re.DOTALL)
