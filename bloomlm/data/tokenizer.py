"""BLOOM's byte-level tokenizer, run by the `tokenizers` library.

A text is encoded as it is: nothing is added before or after it. A special token that is spelled out in the text
("</s>") becomes that token, as in transformers. Whether the model can embed all ids is for the caller to check.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from bloomlm.data.gpt2_files import MERGES_FILE, VOCAB_FILE, build_tokenizer_json, find_gpt2_files, write_gpt2_files
from bloomlm.data.tokenizer_files import (
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    missing_message,
    named_special_tokens,
    read_json_object,
    read_saved_template,
)
from bloomlm.errors import CheckpointError

# Written into tokenizer_config.json unless the file that was read had another value.
_CONFIG_DEFAULTS = {
    "tokenizer_class": "BloomTokenizerFast",
    "padding_side": "left",
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
}


class Tokenizer:
    """Converts text to ids and back.

    Args:
        tokenizer_json: content of tokenizer.json.
        config: content of tokenizer_config.json ({} if there is none).
        special_tokens: the text of each special token, by the keys of DEFAULT_SPECIAL_TOKENS.
        name: name of the tokenizer in error messages.

    Raises:
        CheckpointError: the JSON is not a tokenizer, or it has no id for a special token.
    """

    def __init__(
        self, tokenizer_json: bytes, *, config: Mapping[str, Any], special_tokens: Mapping[str, str], name: str
    ) -> None:
        try:
            self._backend = Backend.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(
                f"{name}: {TOKENIZER_FILE} cannot be read as a tokenizer ({error}); expected the file that the "
                "`tokenizers` library writes. Fetch it again, or save it with a version no newer than the installed one"
            ) from error
        # tokenizer.json may ask for both; here the caller decides what is cut and what is padded
        self._backend.no_truncation()
        self._backend.no_padding()
        self._json = tokenizer_json
        self._config = dict(config)
        self.special_tokens = dict(special_tokens)
        """The texts of <unk>, <s>, </s> and <pad>, by the keys of DEFAULT_SPECIAL_TOKENS."""
        self.name = name
        ids = {key: self._special_id(key, token) for key, token in special_tokens.items()}
        self.unk_token_id = ids["unk_token"]
        self.bos_token_id = ids["bos_token"]
        self.eos_token_id = ids["eos_token"]
        self.pad_token_id = ids["pad_token"]
        self._check_added_tokens()
        # a token may be special although only the other JSON files say so
        self._backend.add_special_tokens(
            [AddedToken(token, normalized=False, special=True) for token in special_tokens.values()]
        )
        self._special_ids = frozenset(
            token_id for token_id, token in self._backend.get_added_tokens_decoder().items() if token.special
        )

    @classmethod
    def from_directory(cls, directory: str | Path, *, as_gpt2: bool = False) -> "Tokenizer":
        """Read a tokenizer from the directory of a checkpoint.

        Args:
            directory: holds tokenizer.json, or GPT-2's vocab.json and merges.txt instead. tokenizer_config.json and
                special_tokens_map.json name the special tokens, if they exist.
            as_gpt2: read vocab.json and merges.txt as GPT-2's tokenizer does, see build_tokenizer_json.

        Raises:
            CheckpointError: a file is missing or damaged, or a special token has no id.
        """
        directory = Path(directory)
        path = directory / TOKENIZER_FILE
        has_gpt2_files = not path.is_file() and find_gpt2_files(directory)
        if not (path.is_file() or has_gpt2_files):
            raise CheckpointError(missing_message(directory))
        if as_gpt2 and not has_gpt2_files:
            raise CheckpointError(
                f"{directory} holds {TOKENIZER_FILE}, which says how texts are split into words; {VOCAB_FILE} and "
                f"{MERGES_FILE} can be read as by GPT-2's tokenizer only without it"
            )
        config = read_json_object(directory / TOKENIZER_CONFIG_FILE)
        if template := read_saved_template(directory):
            config["chat_template"] = template
        special_tokens = named_special_tokens(config, read_json_object(directory / SPECIAL_TOKENS_FILE))
        if has_gpt2_files:
            prefix_space = bool(config.get("add_prefix_space", False))
            content = build_tokenizer_json(directory, special_tokens, as_gpt2=as_gpt2, add_prefix_space=prefix_space)
        else:
            content = path.read_bytes()
        return cls(content, config=config, special_tokens=special_tokens, name=str(directory))

    @property
    def vocab_size(self) -> int:
        """Number of ids in use; the model's embedding may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def chat_template(self) -> str | None:
        """The Jinja template of conversations that came with the tokenizer."""
        return self._config.get("chat_template")

    @property
    def fingerprint(self) -> str:
        """Hex digest of everything that encoding depends on."""
        digest = hashlib.sha256(self._json)
        digest.update(json.dumps(self.special_tokens, sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def json(self) -> bytes:
        """The bytes of tokenizer.json."""
        return self._json

    def with_json(self, tokenizer_json: bytes) -> "Tokenizer":
        """The same settings on another tokenizer.json, in which tokens may have other ids."""
        plain = {key: value for key, value in self._config.items() if key != "added_tokens_decoder"}
        changed = Tokenizer(tokenizer_json, config=plain, special_tokens=self.special_tokens, name=self.name)
        if entries := self._config.get("added_tokens_decoder"):
            ids = {changed._backend.token_to_id(entry["content"]): entry for entry in entries.values()}
            changed._config["added_tokens_decoder"] = {str(token_id): entry for token_id, entry in ids.items()}
        return changed

    def with_chat_template(self, template: str | None) -> "Tokenizer":
        """The same tokenizer with this Jinja template of conversations, which save writes; None: with its own."""
        if template is None:
            return self
        changed = copy(self)
        changed._config = {**self._config, "chat_template": template}
        return changed

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without added special tokens."""
        return self.encode_batch([text])[0]  # unlike the backend's encode, it lets other threads run meanwhile

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, computed on all cores unless TOKENIZERS_PARALLELISM is false."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_batch_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids of many texts, and the (start, stop) of the characters that each id stands for, wholly or in part."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids, with its original spaces; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids; ids outside the vocabulary have no text.
            skip_special_tokens: leave out <unk>, <s>, </s>, <pad> and other tokens marked special.
        """
        return self._backend.decode([int(token_id) for token_id in ids], skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes of one token, which may be only part of a character.

        Source: the byte alphabet of GPT-2's byte-level BPE, which BLOOM uses.
        """
        token = self._backend.id_to_token(int(token_id))
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # added tokens are plain text and not in the byte alphabet
            return token.encode("utf-8")

    def is_special(self, token_id: int) -> bool:
        """Whether a token is <unk>, <s>, </s>, <pad> or another token marked special."""
        return int(token_id) in self._special_ids

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json (byte for byte as read), tokenizer_config.json and special_tokens_map.json.

        The directory must exist. The files are not written atomically.
        """
        self._save(Path(directory), _CONFIG_DEFAULTS | self._config | self.special_tokens)

    def save_with_gpt2_files(self, directory: str | Path) -> None:
        """Write the files of save, and vocab.json and merges.txt for programs that read these.

        Raises:
            CheckpointError: the tokenizer is not byte-level BPE.
        """
        config = _CONFIG_DEFAULTS | self._config | self.special_tokens | {"tokenizer_class": "BloomTokenizer"}
        self._save(Path(directory), config)
        write_gpt2_files(Path(directory), self._json)

    def _save(self, directory: Path, config: Mapping[str, Any]) -> None:
        (directory / TOKENIZER_FILE).write_bytes(self._json)
        for file_name, content in (
            (TOKENIZER_CONFIG_FILE, config),
            (SPECIAL_TOKENS_FILE, self.special_tokens),
        ):
            text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
            (directory / file_name).write_text(text, encoding="utf-8")

    @cached_property
    def has_byte_decoder(self) -> bool:
        """Whether decoding joins the bytes of the tokens, as in every published BLOOM."""
        decoder = self._backend.decoder
        if decoder is None:
            return False
        content = json.loads(decoder.__getstate__())  # the decoder alone: the whole JSON would take 0.1 s to parse
        steps = content.get("decoders", [content])
        return [step.get("type") for step in steps] == ["ByteLevel"]

    def _special_id(self, key: str, token: str) -> int:
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise CheckpointError(
                f"{self.name}: {key} is {token!r}, but {TOKENIZER_FILE} has no id for it "
                f"({self.vocab_size} tokens). Name one of its tokens as {key!r} in {TOKENIZER_CONFIG_FILE}"
            )
        return token_id

    def _check_added_tokens(self) -> None:
        try:
            entries = self._config.get("added_tokens_decoder", {}).items()
            added = [
                (token_id, self._backend.id_to_token(int(token_id)), entry["content"]) for token_id, entry in entries
            ]
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{self.name}: added_tokens_decoder of {TOKENIZER_CONFIG_FILE} does not map ids to tokens ({error!r}). "
                "Save it again"
            ) from error
        for token_id, found, content in added:
            if found != content:
                raise CheckpointError(
                    f"{self.name}: {TOKENIZER_CONFIG_FILE} gives id {token_id} to {content!r}, but in "
                    f"{TOKENIZER_FILE} that id is {found!r}. Save both files together again"
                )


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte: printable Latin-1 stands for itself, and U+0100 onwards for the other bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
