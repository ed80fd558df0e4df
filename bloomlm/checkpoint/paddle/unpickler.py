"""Read Paddle's pickles (.pdparams, .pdopt) without executing any code in them.

Python's unpickler imports and calls any object that a file names. This interpreter knows only the few opcodes and the
six globals that paddle.save writes, and builds plain values from them without importing or calling anything. An array
becomes a LazyTensor, so that opening a file of any size reads kilobytes.

Source: the opcodes as Python's pickletools describes them; the globals that PaddleNLP's files hold.
"""

import os
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

from bloomlm.checkpoint.paddle.lazy import StoredFile
from bloomlm.checkpoint.paddle.objects import GLOBALS, Span, Text, call, plain_value, set_state
from bloomlm.errors import CheckpointError

# Ten times the number in the optimizer state of BLOOM 176B; a file of endless opcodes is refused.
MAX_OPCODES = 2_000_000
# Names are shorter; longer texts are the bytes of arrays, which stay in the file.
MAX_TEXT_BYTES = 65_536
PROTOCOLS = (2, 3, 4)
NEWEST_PROTOCOL = 5  # Python's newest; the opcodes of such a file are refused, so that the message can name them

_MARK: Final = object()
_OPCODES: Final = {info.code.encode("latin-1"): info for info in pickletools.opcodes}


def load_paddle_pickle(path: Path) -> Any:
    """Read one pickle of paddle.save.

    Args:
        path: the file.

    Returns:
        Its value, made of dict, list, tuple, str, int, float, bool, None and LazyTensor.

    Raises:
        CheckpointError: the file names a global that Paddle's state files do not need (it is not executed), is
            truncated or invalid, or has another protocol than 2, 3 or 4.
    """
    stored = StoredFile(path)
    try:
        with path.open("rb") as stream:
            return _Interpreter(stored, stream).run()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


class _Interpreter:
    """One pass over the opcodes, with a stack and a memo."""

    def __init__(self, stored: StoredFile, stream: BinaryIO) -> None:
        self.stored, self.stream = stored, stream
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.protocol = 0
        self.opcode_offset = 0

    def run(self) -> Any:
        """Follow the opcodes to STOP."""
        for _ in range(MAX_OPCODES):
            self.opcode_offset = self.stream.tell()
            opcode = self.take(1)
            if opcode == b".":
                return self.finish()
            handler = _HANDLERS.get(opcode)
            if handler is None:
                self.refuse_opcode(opcode)
            handler(self)
        raise self.error(f"more than {MAX_OPCODES} opcodes, more than any BLOOM's state takes")

    def error(self, problem: str) -> CheckpointError:
        """An error with the file, the offset and, if it is not one of Paddle's, the protocol."""
        protocol = ""
        if self.protocol not in PROTOCOLS:
            protocol = f", pickle protocol {self.protocol} where paddle.save writes 2, 3 or 4"
        place = f"byte {self.opcode_offset} of {self.stored.size_bytes}{protocol}"
        return CheckpointError(
            f"{self.stored.path}: {problem} ({place}); expected a state dict of plain"
            " tensors as paddle.save writes it: fetch it again, or save it again with "
            "paddle.save(layer.state_dict(), path)"
        )

    def refuse_opcode(self, opcode: bytes) -> NoReturn:
        """Raise an error that names an opcode, or for INST, the old opcode of globals, the global."""
        known = _OPCODES.get(opcode)
        if known is None:
            raise self.error(f"{opcode!r} is not a pickle opcode: the file is damaged, or not a pickle")
        if known.name == "INST":
            self.push_global(self.line(), self.line())
        raise self.error(f"the pickle opcode {known.name}, which Paddle's state files do not need, was refused")

    def take(self, count: int) -> bytes:
        """The next bytes."""
        data = self.stream.read(count)
        if len(data) != count:
            raise self.error("the file is cut short")
        return data

    def number(self, form: str) -> int:
        """The next little-endian number of a struct form."""
        return int(struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0])

    def line(self) -> str:
        """The rest of the line."""
        data = self.stream.readline(MAX_TEXT_BYTES)
        if not data.endswith(b"\n"):
            raise self.error("the file is cut short")
        return data[:-1].decode("utf-8", "replace")

    def pass_over(self, length: int) -> Span:
        """Skip bytes and return their place."""
        offset = self.stream.tell()
        left = self.stored.size_bytes - offset
        if length > left:
            raise self.error(f"the file is cut short: {length} bytes were promised and {left} are left")
        self.stream.seek(length, os.SEEK_CUR)
        return Span(offset, length)

    def push_text(self, length: int) -> None:
        """Push a text, or only its place in the file if it is too long to be a name."""
        if length > MAX_TEXT_BYTES:
            self.stack.append(self.pass_over(length))
            return
        offset = self.stream.tell()
        try:
            text = Text(self.take(length).decode("utf-8", "surrogatepass"))
        except UnicodeDecodeError as error:
            raise self.error(f"a text that is not UTF-8 ({error})") from error
        text.span = Span(offset, length)
        self.stack.append(text)

    def push_global(self, module: object, name: object) -> None:
        """Push the stand-in of an allowed global."""
        found = GLOBALS.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
        if found is None:
            raise self.error(
                f"it asks for the Python object {module}.{name}, which a state dict does not need and which could run "
                "anything; it was refused and nothing was run"
            )
        self.stack.append(found)

    def pop(self) -> Any:
        """Take the top of the stack."""
        if not self.stack or self.stack[-1] is _MARK:
            raise self.error("the pickle takes from an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        """Take everything above the last mark."""
        items: list[Any] = []
        while self.stack:
            if (item := self.stack.pop()) is _MARK:
                return items[::-1]
            items.append(item)
        raise self.error("the pickle looks for a mark that is not there")

    def remember(self, index: int) -> None:
        """Store the top of the stack in the memo."""
        value = self.pop()
        self.memo[index] = value
        self.stack.append(value)

    def recall(self, index: int) -> None:
        """Push a value of the memo."""
        if index not in self.memo:
            raise self.error(f"the pickle recalls value {index}, which it never remembered")
        self.stack.append(self.memo[index])

    def push_tuple(self, count: int) -> None:
        """Replace the top values by a tuple."""
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(items[::-1]))

    def set_items(self, items: list[Any]) -> None:
        """Put keys and values into the dict below them."""
        target = self.pop()
        if not isinstance(target, dict) or len(items) % 2:
            raise self.error("the pickle sets items of something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int)):
                raise self.error(f"a dict has a key of type {type(key).__name__}")
            target[key] = value
        self.stack.append(target)

    def append_items(self, items: list[Any]) -> None:
        """Append values to the list below them."""
        target = self.pop()
        if not isinstance(target, list):
            raise self.error("the pickle appends to something that is not a list")
        target.extend(items)
        self.stack.append(target)

    def begin(self) -> None:
        """PROTO."""
        self.protocol = self.number("B")
        if self.protocol > NEWEST_PROTOCOL:
            raise self.error("no such pickle protocol exists")

    def reduce(self) -> None:
        """Call a stand-in."""
        arguments, function = self.pop(), self.pop()
        try:
            self.stack.append(call(function, arguments))
        except ValueError as error:
            raise self.error(str(error)) from error

    def build(self) -> None:
        """Give a stand-in its state."""
        state, target = self.pop(), self.pop()
        try:
            set_state(target, state, self.stored)
        except ValueError as error:
            raise self.error(str(error)) from error
        self.stack.append(target)

    def stack_global(self) -> None:
        """STACK_GLOBAL: the name is above its module."""
        name, module = self.pop(), self.pop()
        self.push_global(module, name)

    def finish(self) -> Any:
        """The last value, as plain types and lazy tensors."""
        value = self.pop()
        if self.stack:
            raise self.error("the pickle ends with values left over")
        if self.protocol not in PROTOCOLS:
            raise self.error("a pickle that Paddle did not write")
        try:
            return plain_value(value)
        except ValueError as error:
            raise self.error(str(error)) from error


def _frame(interpreter: _Interpreter) -> None:
    interpreter.take(8)  # the length of a frame, which does not matter here


def _integer(interpreter: _Interpreter) -> None:
    interpreter.stack.append(int.from_bytes(interpreter.take(interpreter.number("B")), "little", signed=True))


def _double(interpreter: _Interpreter) -> None:
    interpreter.stack.append(struct.unpack(">d", interpreter.take(8))[0])


def _append_one(interpreter: _Interpreter) -> None:
    interpreter.append_items([interpreter.pop()])


def _set_one(interpreter: _Interpreter) -> None:
    value, key = interpreter.pop(), interpreter.pop()
    interpreter.set_items([key, value])


_HANDLERS: Final[dict[bytes, Callable[[_Interpreter], None]]] = {
    b"\x80": _Interpreter.begin,
    b"\x95": _frame,
    b"(": lambda i: i.stack.append(_MARK),
    b"N": lambda i: i.stack.append(None),
    b"\x88": lambda i: i.stack.append(True),
    b"\x89": lambda i: i.stack.append(False),
    b"J": lambda i: i.stack.append(i.number("i")),
    b"K": lambda i: i.stack.append(i.number("B")),
    b"M": lambda i: i.stack.append(i.number("H")),
    b"\x8a": _integer,
    b"G": _double,
    b"\x8c": lambda i: i.push_text(i.number("B")),
    b"X": lambda i: i.push_text(i.number("I")),
    b"\x8d": lambda i: i.push_text(i.number("Q")),
    b"C": lambda i: i.stack.append(i.pass_over(i.number("B"))),
    b"B": lambda i: i.stack.append(i.pass_over(i.number("I"))),
    b"\x8e": lambda i: i.stack.append(i.pass_over(i.number("Q"))),
    b"}": lambda i: i.stack.append({}),
    b"]": lambda i: i.stack.append([]),
    b")": lambda i: i.stack.append(()),
    b"t": lambda i: i.stack.append(tuple(i.pop_to_mark())),
    b"\x85": lambda i: i.push_tuple(1),
    b"\x86": lambda i: i.push_tuple(2),
    b"\x87": lambda i: i.push_tuple(3),
    b"u": lambda i: i.set_items(i.pop_to_mark()),
    b"s": _set_one,
    b"e": lambda i: i.append_items(i.pop_to_mark()),
    b"a": _append_one,
    b"q": lambda i: i.remember(i.number("B")),
    b"r": lambda i: i.remember(i.number("I")),
    b"\x94": lambda i: i.remember(len(i.memo)),
    b"h": lambda i: i.recall(i.number("B")),
    b"j": lambda i: i.recall(i.number("I")),
    b"c": lambda i: i.push_global(i.line(), i.line()),
    b"\x93": _Interpreter.stack_global,
    b"R": _Interpreter.reduce,
    b"b": _Interpreter.build,
}
