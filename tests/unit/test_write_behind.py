"""Writing in a thread: in order, errors are not lost, and nothing is pending when a tensor's owner goes on."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bloomlm.checkpoint.convert import FileForm, convert_model, open_model_conversion
from bloomlm.checkpoint.output import FileBehind, WriteBehind
from bloomlm.checkpoint.reader import load_model
from bloomlm.checkpoint.writer import write_model
from bloomlm.errors import CheckpointError
from tests.paddle_files import CONFIG, make_model
from tests.tiny_checkpoint import assert_equal_models


def test_bytes_arrive_in_order(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, WriteBehind() as behind:
        writer = FileBehind(file, behind)
        assert sum(writer.write(bytes([number]) * 1000) for number in range(200)) == 200_000
        writer.seek(3000)
        writer.write(b"here")
    content = (tmp_path / "file").read_bytes()
    expected = b"".join(bytes([number]) * 1000 for number in range(200))
    assert content == expected[:3000] + b"here" + expected[3004:]


def test_wait_comes_back_when_all_is_done() -> None:
    go_on, done = threading.Event(), []
    with WriteBehind() as behind:
        behind.do(lambda: (go_on.wait(5), done.append(1)))
        assert not done
        go_on.set()
        behind.wait()
        assert done == [1]


def fail() -> None:
    raise OSError("no space left")


def test_an_error_is_raised_by_what_comes_next() -> None:
    for then in (lambda behind: behind.wait(), lambda behind: behind.do(print), lambda behind: None):
        with pytest.raises(OSError, match="no space left"), WriteBehind() as behind:
            behind.do(fail)
            then(behind)


def test_an_error_of_the_caller_is_not_hidden() -> None:
    with pytest.raises(KeyError), WriteBehind() as behind:
        behind.do(fail)
        raise KeyError


@pytest.mark.parametrize("form", FileForm)
def test_a_full_disk_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: FileForm
) -> None:
    (tmp_path / "hf").mkdir()
    write_model(tmp_path / "hf", CONFIG, make_model().named_parameters())
    count = [0]

    def write(self: FileBehind, data: bytes | memoryview) -> int:
        count[0] += 1
        self._behind.do(fail if count[0] == 9 else lambda: self._file.write(data))
        return len(data)

    monkeypatch.setattr(FileBehind, "write", write)
    with pytest.raises(CheckpointError, match=r"cannot be written to .*no space left"):
        convert_model(open_model_conversion(tmp_path / "hf", form), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("form", FileForm)
def test_memory_may_be_used_again_once_a_tensor_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: FileForm
) -> None:
    """The reader overwrites what it gave before, and the thread is slow."""
    model = make_model()
    (tmp_path / "hf").mkdir()
    write_model(tmp_path / "hf", CONFIG, model.named_parameters())
    do = WriteBehind.do

    def do_late(self: WriteBehind, action: Callable[[], object]) -> None:
        do(self, lambda: (time.sleep(0.002), action()))

    monkeypatch.setattr(WriteBehind, "do", do_late)
    conversion = open_model_conversion(tmp_path / "hf", form)
    given: list[Tensor] = []
    read = conversion.reader.read

    def read_over(name: str) -> Tensor:
        for tensor in given:
            tensor.fill_(7.0)
        given[:] = [read(name).clone()]
        return given[0]

    conversion.reader.read = read_over  # type: ignore[method-assign]
    convert_model(conversion, tmp_path / "out")
    assert_equal_models(load_model(tmp_path / "out"), model)
    assert torch.equal(given[0], model.transformer.ln_f.bias)
