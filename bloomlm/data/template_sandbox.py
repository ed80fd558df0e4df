"""Jinja for templates that are not trusted: they cannot reach Python, and their time and their texts have bounds.

Jinja's own sandbox keeps templates from Python's internals and from changing what they are given. It lets them loop for
ever and multiply a text until the memory ends; here every step of a loop, every call, every operator and every filter
is charged to a budget.
"""

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MOST_SECONDS = 5.0
"""Processor time of one text."""
MOST_CHARACTERS = 10**8
"""Characters and items of all texts and lists that one rendering makes on its way."""

_STEPS, _TEXT = "bloomlm steps", "bloomlm text"  # no template can name them
_WIDTHS = ("batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "tojson", "wordwrap", "zfill")
_HUGE_WIDTH = re.compile(r"\d{7}")


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """An environment for templates from strangers; render them within `budget`.

    Args:
        extensions: extensions of Jinja.
        filters: more filters, by name.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, *, extensions: list[type[Extension]], filters: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self._local = threading.local()
        self.filters |= {
            name: self._charged(name, function) for name, function in {**self.filters, **filters}.items()
        } | {_STEPS: pass_context(lambda context, items: self._steps(items)), _TEXT: self._made}
        del self.globals["lipsum"]

    @contextmanager
    def budget(self) -> Iterator[None]:
        """The time and the characters that templates have in this thread until the end.

        A template that needs more raises a jinja2.exceptions.SecurityError.
        """
        self._local.until, self._local.characters = time.thread_time() + MOST_SECONDS, MOST_CHARACTERS
        yield

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator whose result may be larger than both operands."""
        sizes = [_size(value) for value in (left, right)]
        if operator == "*" and any(isinstance(value, str | list | tuple) for value in (left, right)):
            self._made_characters(max(sizes) * max(value if isinstance(value, int) else 0 for value in (left, right)))
        elif operator == "*":
            self._made_characters(sizes[0] * sizes[1])  # the time of a product of numbers
        elif operator == "**" and isinstance(right, int):
            self._made_characters((sizes[0] * abs(right)) ** 2)
        elif operator == "%" and isinstance(left, str):
            self._check_widths(left, right if isinstance(right, tuple) else (right,))
        return self._made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A function, a macro or a method."""
        __self._step()
        name, owner = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        __self._check_arguments(name, args, kwargs)
        __self._check_product(owner, *args, *kwargs.values())
        if name in ("format", "format_map"):  # Jinja's sandbox has wrapped it
            form = getattr(getattr(__obj, "__wrapped__", None), "__self__", "")
            __self._check_widths(form, (*args, *kwargs.values()))
        return __self._made(super().call(__context, __obj, *args, **kwargs))

    def concat(self, pieces: Iterable[str]) -> str:
        """Jinja's way to join what a template, a macro or a block puts out."""
        counted = []
        for piece in pieces:
            self._made_characters(len(piece))
            counted.append(piece)
        return "".join(counted)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Charges().visit(tree)
        return tree

    def _charged(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # copies Jinja's notes about its arguments, too
        def charged(*args: Any, **kwargs: Any) -> Any:
            self._step()
            self._check_arguments(name, args[1:], kwargs)
            self._check_product(*args, *kwargs.values())
            if name == "format":
                self._check_widths(str(args[0]), (*args[1:], *kwargs.values()))
            return self._made(function(*args, **kwargs))

        return charged

    def _steps(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._step()
            yield item

    def _step(self) -> None:
        if time.thread_time() > self._local.until:
            raise SecurityError(f"it takes longer than {MOST_SECONDS:.0f} s")

    def _made(self, value: Any) -> Any:
        self._made_characters(_size(value))
        return value

    def _made_characters(self, count: int) -> None:
        self._local.characters -= count
        if self._local.characters < 0:
            raise _too_large()

    def _check_product(self, *values: Any) -> None:
        """Refuse arguments of which a function may make a text as long as the product of their lengths."""
        *_, second, first = (0, 0, *sorted(map(_size, values)))
        if first * second > 2 * MOST_CHARACTERS:
            raise _too_large()

    def _check_arguments(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if name in _WIDTHS:
            self._check_widths("", (*args, *kwargs.values()))

    def _check_widths(self, form: str, values: Iterable[Any]) -> None:
        if _HUGE_WIDTH.search(form) or any(isinstance(value, int) and value > 10**6 for value in values):
            raise _too_large()


class _Charges(NodeTransformer):
    """Leads what loops go over, and what ~ makes, through filters that charge it."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        assert isinstance(node.iter, nodes.Expr)
        node.iter = _filtered(node.iter, _STEPS)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _TEXT)


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _size(value: Any) -> int:
    """Characters of a text, items of a list and of the texts in it, bytes of a number."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, list | tuple):
        return len(value) + sum(len(item) for item in value if isinstance(item, str))
    if isinstance(value, int):
        return -(-value.bit_length() // 8)
    return 0


def _too_large() -> SecurityError:
    return SecurityError(f"it makes texts of more than {MOST_CHARACTERS:,} characters")
