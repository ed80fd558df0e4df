"""What `bloomlm chat` has been told so far: a conversation, or texts that a model without a chat template continued."""

from typing import Any, Protocol

from bloomlm.data.chat_template import ChatTemplate
from bloomlm.errors import ConfigError


class Dialog(Protocol):
    """The lines of a user and the answers of a model."""

    def prompt(self, line: str) -> str:
        """The text that the model is to continue after a new line.

        Raises:
            DataError: the chat template does not take the conversation.
        """
        ...

    def add(self, line: str, answer: str) -> None:
        """Remember a line and the whole text of its answer."""
        ...

    def undo(self) -> bool:
        """Forget the last line and its answer; False if there is none."""
        ...

    def reset(self) -> None:
        """Forget all lines and answers."""
        ...

    def set_system(self, text: str) -> None:
        """Begin anew with this system message; an empty text stands for none.

        Raises:
            ConfigError: texts that are only continued have no system message.
        """
        ...

    def rows(self) -> list[dict[str, Any]]:
        """What was said, as rows that `bloomlm finetune` learns from."""
        ...


class Conversation:
    """Turns that a chat template makes a prompt of.

    Args:
        template: the chat template.
        system: the system message, or an empty text.
    """

    def __init__(self, template: ChatTemplate, system: str) -> None:
        self._template = template
        self._messages: list[dict[str, str]] = []
        self.set_system(system)

    def prompt(self, line: str) -> str:
        """See Dialog."""
        messages = [*self._messages, {"role": "user", "content": line}]
        return self._template.render(messages, add_generation_prompt=True)

    def add(self, line: str, answer: str) -> None:
        """See Dialog. Blanks around the answer belong to the template."""
        self._messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer.strip()}]

    def undo(self) -> bool:
        """See Dialog."""
        has_turn = len(self._messages) >= 2
        if has_turn:
            del self._messages[-2:]
        return has_turn

    def reset(self) -> None:
        """See Dialog. The system message stays."""
        self._messages = self._messages[:1] if self._has_system else []

    def set_system(self, text: str) -> None:
        """See Dialog."""
        self._messages = [{"role": "system", "content": text}] if text else []
        self._has_system = bool(text)

    def rows(self) -> list[dict[str, Any]]:
        """See Dialog."""
        return [{"messages": self._messages}] if len(self._messages) >= 2 else []


class Continuations:
    """Texts that are continued, each for itself."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def prompt(self, line: str) -> str:
        """See Dialog."""
        return line

    def add(self, line: str, answer: str) -> None:
        """See Dialog."""
        self._rows.append({"prompt": line, "completion": answer})

    def undo(self) -> bool:
        """See Dialog."""
        return bool(self._rows) and self._rows.pop() is not None

    def reset(self) -> None:
        """See Dialog."""
        self._rows = []

    def set_system(self, text: str) -> None:
        """See Dialog."""
        raise ConfigError(
            "the model has no chat template, so texts are continued as they are and a system message has no place; "
            "--chat_template plain makes it a conversation"
        )

    def rows(self) -> list[dict[str, Any]]:
        """See Dialog."""
        return self._rows
