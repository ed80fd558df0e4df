"""A job on two machines: two network namespaces that see each other through one cable only, a launcher in each."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bloomlm.training.finetune import finetune
from tests.distributed.test_finetune import assert_same_losses, data, flags, losses  # noqa: F401
from tests.distributed.test_launchers import ROOT, command_line

ADDRESSES = ("10.213.0.1", "10.213.0.2")
CABLE = "cable0"
TIMEOUT_SECONDS = 600


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no network namespaces can be made here: ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Two namespaces with a veth pair between them."""
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces can be made here: there is no ip (iproute2)")
    names = [f"bloomlm-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            for device in ("lo", CABLE):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            left = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
            for process in left.stdout.split():  # of a test that failed
                os.kill(int(process), signal.SIGKILL)
            # the cable goes with it
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


# The same flags in the spelling of torchrun, which counts the processes of a machine, and of bloomlm, which counts all.
TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2")
BLOOMLM = ("bloomlm", "finetune", "--num_processes", "4")


def run_job(nodes: list[str], launcher: tuple[str, ...], *arguments: str) -> list[tuple[int, str]]:
    """Two processes on each node; status and stderr of each launcher."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": CABLE}
    places = ["--nnodes", "2", "--master-addr", ADDRESSES[0], "--master-port", "29400"]
    command = [sys.executable, "-m", *launcher, *places]
    jobs = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *command, "--node-rank", str(number), *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        for number, name in enumerate(nodes)
    ]
    try:
        told = [job.communicate(timeout=TIMEOUT_SECONDS)[1] for job in jobs]
        return [(job.returncode, errors) for job, errors in zip(jobs, told, strict=True)]
    finally:
        for job in jobs:
            job.kill()


def sent_over_the_cable(node: str) -> int:
    """Bytes that a node sent to the other."""
    done = subprocess.run(
        ["ip", "netns", "exec", node, "cat", f"/sys/class/net/{CABLE}/statistics/tx_bytes"],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_a_job_on_two_nodes_dies_and_goes_on(nodes: list[str], tmp_path: Path, data: Path) -> None:  # noqa: F811
    """Tensor parallelism on each node, FSDP between them; a rank is killed in the third step."""
    output_dir = tmp_path / "run"
    words = [*command_line(output_dir, data), "--per_device_train_batch_size", "2", "--sharding", "stage3"]
    died = run_job(nodes, TORCHRUN, "tests/distributed/killed_run.py", "kill", "finetune", *words)
    assert all(status != 0 for status, _ in died)
    assert (output_dir / "checkpoint-2").is_dir() and not (output_dir / "checkpoint-3").exists()
    went_on = run_job(nodes, BLOOMLM, *words)
    assert [status for status, _ in went_on] == [0, 0], went_on
    assert "resuming from" in went_on[0][1]
    assert "resuming from" not in went_on[1][1]  # rank 0 alone talks
    finetune(flags(tmp_path / "one", data, per_device_train_batch_size=4, save_steps=100))
    assert_same_losses(losses(output_dir), losses(tmp_path / "one"))
    # gathered and added up weights of 1 million parameters went from node to node
    assert all(sent_over_the_cable(node) > 10_000_000 for node in nodes)
