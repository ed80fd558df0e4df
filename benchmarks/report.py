"""Runs every benchmark, records the results, and redraws the tables of docs/benchmarks.md.

    make bench-report                     # everything; some hours
    make bench-report ONLY=train_step     # the jobs of jobs.py whose names begin so
    make bench-report FORCE=1             # again, even where nothing has changed

Results go to benchmarks/results/KIND OF PROCESSOR/JOB.json. A job is left out if this kind of processor has a result of
it and neither the package nor its script has changed since, so an interrupted run goes on where it stopped; it is also
left out if a package, a text or a GPU is missing, which the end tells. A script by itself records nothing.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import peers
import serve_sides
import tables
from jobs import JOBS, PIP, Job

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
PICTURE = HERE.parent / "docs" / "images" / "ratios.png"
PACKAGES = ("torch", "transformers", "peft", "trl", "lm_eval", "datasets", "bitsandbytes")
"""Whose versions are recorded where a job needs them; torch's always. Peers of peers.py come with their sides."""
LIMITS = ("BLOOMLM_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
INSTRUCTIONS = {"avx512_vnni": "VNNI", "avx512_bf16": "bf16", "avx512_fp16": "fp16", "amx_bf16": "AMX"}


def processor(job: Job) -> str:
    """The kind of processor that a job runs on: what decides its speed."""
    import torch

    from bloomlm.diagnosis import machine

    if job.on_gpu:
        return torch.cuda.get_device_name()
    facts = machine.processor()
    have = facts["instruction_sets"]
    level = "AVX-512" if "avx512f" in have else "AVX2" if "avx2" in have else platform.machine()
    more = [name for flag, name in INSTRUCTIONS.items() if flag in have]
    kind = f"{facts['name']}, {facts['cores']} cores, {' + '.join([level, *more])}"
    limits = {os.environ[name].lower() for name in LIMITS if name in os.environ}
    return f"{kind}, limited to {', '.join(sorted(limits)).upper()}" if limits else kind


def path_of(job: Job, kind: str) -> Path:
    """Where its result lies."""
    return tables.RESULTS / re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-") / f"{job.name}.json"


def is_current(job: Job, path: Path) -> bool:
    """Whether nothing that the job measures has changed since its result."""
    if not path.exists():
        return False
    commit = json.loads(path.read_text(encoding="utf-8"))["commit"]
    changed = ["git", "diff", "--quiet", commit or "", "--", "bloomlm", f"benchmarks/{job.script}"]
    return bool(commit) and subprocess.run(changed, cwd=HERE.parent, check=False, capture_output=True).returncode == 0


def commit_now() -> str:
    """The commit of the working tree; empty where the package or a script has changes of its own."""
    command = ["git", "status", "--porcelain", "--untracked-files=no", "--", "bloomlm", "benchmarks/*.py"]
    changes = subprocess.run(command, cwd=HERE.parent, check=True, capture_output=True, text=True).stdout
    command = ["git", "rev-parse", "--short", "HEAD"]
    head = subprocess.run(command, cwd=HERE.parent, check=True, capture_output=True, text=True).stdout.strip()
    return "" if changes else head


def versions(job: Job) -> dict[str, str]:
    """Of Python and of the packages that a job compares."""
    names = [name for name in PACKAGES if name == "torch" or name in job.needs]
    names += [PIP.get(name, name) for kind in peers.PACKAGES if kind in job.command for name in peers.PACKAGES[kind]]
    found = {"Python": platform.python_version().rpartition(".")[0]}
    for name in dict.fromkeys(names):
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def run(job: Job, kind: str) -> None:
    """Run a job and record its result."""
    commit = commit_now()
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory) / "rows.json"
        # the package of this checkout, whatever is installed
        paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "BLOOMLM_BENCH_ROWS": str(rows), "PYTHONPATH": os.pathsep.join(paths)}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # users have bytecode on the disk
        subprocess.run([sys.executable, *job.words(HERE)], cwd=HERE.parent, env=environment, check=True)
        figures = json.loads(rows.read_text())
    result = {
        "processor": kind,
        "date": f"{datetime.date.today()}",
        "commit": commit,
        "command": f"python benchmarks/{job.command}",
        "versions": versions(job),
        "rows": {
            name: [{key: float(f"{value:.5g}") for key, value in each.items()} for each in rounds]
            for name, rounds in figures.items()
        },
    }
    path = path_of(job, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def redraw_page() -> None:
    """The tables, from what is recorded."""
    results = tables.load_results()
    PAGE.write_text(tables.redraw(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


def missing_sides() -> list[str]:
    """Peers of jobs of several sides that are left out, and what to do about it."""
    found = []
    for kind in peers.PACKAGES:
        missing = [PIP.get(name, name) for name in peers.missing_packages(kind)]
        found += [f"{kind} beside programs: pip install {' '.join(missing)}"] if missing else []
    servers = {kind: serve_sides.missing(kind) for kind in serve_sides.PEERS}
    return found + [f"{kind} beside servers: {reason}" for kind, reason in servers.items() if reason]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="jobs whose names begin so")
    parser.add_argument("--force", action="store_true", help="run what has a current result, too")
    parser.add_argument("--draw", action="store_true", help="run nothing, draw the page and its picture")
    args = parser.parse_args()
    if args.draw:
        redraw_page()
        tables.draw_picture(PICTURE, tables.load_results())
        return
    chosen = [job for job in JOBS if job.name.startswith(args.only)]
    if not chosen:
        parser.error(f"no job begins with {args.only}; the jobs are {', '.join(job.name for job in JOBS)}")
    left_out, failed = [], []
    for number, job in enumerate(chosen, 1):
        start = f"[{number}/{len(chosen)}] {job.name}"
        if missing := job.missing():
            left_out.append(f"{job.name}: {', '.join(missing)}")
            print(f"{start}: left out, needs {', '.join(missing)}", flush=True)
            continue
        kind = processor(job)
        if not args.force and is_current(job, path_of(job, kind)):
            print(f"{start}: has a result of this state of the code", flush=True)
            continue
        print(f"{start}: python benchmarks/{job.command}", flush=True)
        try:
            run(job, kind)
        except subprocess.CalledProcessError as error:
            failed.append(job.name)
            print(f"{start}: failed, {error}", flush=True)
            continue
        redraw_page()
    if not args.only:
        tables.draw_picture(PICTURE, tables.load_results())
    print_summary(left_out, failed)
    sys.exit(1 if failed else 0)


def print_summary(left_out: list[str], failed: list[str]) -> None:
    """What is asked and was reached, on every kind of processor, and what was not measured."""
    print(*tables.asked_lines(tables.load_results()), sep="\n")
    for line in left_out:
        print(f"left out: {line}")
    for line in missing_sides():
        print(f"missing: {line}")
    for name in failed:
        print(f"FAILED: {name}")


if __name__ == "__main__":
    main()
