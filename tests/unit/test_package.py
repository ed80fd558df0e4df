"""The wheel has every file of the package, the licences of all that is in it, and the mark of typed packages."""

import json
import shlex
import subprocess
import sys
import tomllib
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from bloomlm.cli.serve import command as serve_command

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


def instructions(keyword: str) -> list[str]:
    """The arguments of an instruction of the Containerfile, wherever it occurs."""
    lines = (ROOT / "Containerfile").read_text().splitlines()
    return [line.removeprefix(f"{keyword} ") for line in lines if line.startswith(f"{keyword} ")]


def test_the_container_installs_the_serve_extra_from_files_that_are_copied_into_it() -> None:
    [words] = [shlex.split(line) for line in instructions("RUN") if line.startswith("pip install")]
    assert words[-1] == "/src[serve]" and words[words.index("--constraint") + 1] == "/src/requirements.lock"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    copied = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    needed = {"bloomlm", "pyproject.toml", "requirements.lock", project["readme"]}
    needed |= {Path(name).parts[0] for name in project["license-files"]}
    assert copied == needed and all((ROOT / name).exists() for name in copied)
    python = instructions("FROM")[0].removeprefix("python:").removesuffix("-slim")
    assert SpecifierSet(project["requires-python"]).contains(python)


def test_the_container_starts_a_server() -> None:
    [entry], [default] = (instructions(keyword) for keyword in ("ENTRYPOINT", "CMD"))
    program, verb, *words = [*json.loads(entry), *json.loads(default)]
    assert (program, verb) == ("bloomlm", "serve")
    options = serve_command.make_context("serve", words).params
    assert (options["host"], options["port"]) == ("0.0.0.0", int(instructions("EXPOSE")[0]))
