"""The wheel has every file of the package, the licences of all that is in it, and the mark of typed packages."""

import subprocess
import sys
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("build", reason="the package `build` is not installed")
pytest.importorskip("setuptools", minversion="77", reason="building without a network needs setuptools 77")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    # a copy, because setuptools writes build/ and *.egg-info beside the sources
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = ["bloomlm", "pyproject.toml", "README.md", "LICENSE"]
    tracked = subprocess.run(["git", "ls-files", *names], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("the files of the package are listed by git, and this is no checkout")
    for name in tracked.stdout.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_every_file_of_the_package_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    tracked = subprocess.run(["git", "ls-files", "bloomlm"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(tracked.stdout.splitlines()) == {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert "bloomlm/py.typed" in wheel.namelist()


def test_the_licences_of_all_that_is_in_the_wheel_are_named_and_present(wheel: zipfile.ZipFile) -> None:
    metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    fields = BytesParser().parsebytes(wheel.read(metadata))
    assert fields["License-Expression"] == "Apache-2.0 AND MIT AND Unicode-3.0"
    directory = metadata.removesuffix("METADATA") + "licenses/"
    beginnings = {name: wheel.read(directory + name)[:300].decode() for name in fields.get_all("License-File")}
    for words in ("Apache License", "The MIT License", "UNICODE LICENSE V3"):
        assert sum(words in text for text in beginnings.values()) == 1, words
    vendored = {name for name in wheel.namelist() if "LICENSE" in name and ".dist-info/" not in name}
    assert vendored < set(beginnings)
