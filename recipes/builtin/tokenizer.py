"""Step 2: the tokenizer of builtin:tiny, a byte-level BPE with BLOOM's pre-tokenizer.

    python recipes/builtin/tokenizer.py CORPUS_DIR MODEL_DIR

Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json. The text it learns from is a share of the
corpus in which no language but English outweighs the others. Digits are cut apart there, so no merge joins them: a
number is always read and written digit by digit, which a small model needs to copy numbers.
"""

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BLOOM_WORDS = r" ?[^(\s|[.,!?…。，、।۔،])]+"
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")
VOCAB_SIZE = 2_048
SEED = 20_241
BYTES_PER_SOURCE = {"docs": 600_000, "code": 200_000}
BYTES_PER_LANGUAGE_SOURCE = 25_000

_ONE_DIGIT = re.compile(r"(\d)")


def sample(path: Path) -> Iterator[str]:
    """Documents of train.jsonl until their source has had its share, with digits cut apart."""
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    random.Random(SEED).shuffle(rows)
    taken: defaultdict[str, int] = defaultdict(int)
    for row in rows:
        source, text = row["source"], row["text"]
        if taken[source] < BYTES_PER_SOURCE.get(source, BYTES_PER_LANGUAGE_SOURCE):
            taken[source] += len(text.encode())
            yield from (part for part in _ONE_DIGIT.split(text) if part)


def build(texts: Iterator[str]) -> Tokenizer:
    """Train the BPE and put it together as BLOOM's tokenizer.json has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BLOOM_WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=True, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Write the three files that Hugging Face tools expect of a BLOOM tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    special = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS, strict=True))
    config = {**special, "tokenizer_class": "BloomTokenizerFast", "padding_side": "left", "add_prefix_space": False}
    for name, content in (("special_tokens_map.json", special), ("tokenizer_config.json", config)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def report(tokenizer: Tokenizer, path: Path) -> None:
    """Print bytes per token over the held-out text, by kind of source."""
    sizes: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for row in map(json.loads, path.open(encoding="utf-8")):
        kind = sizes[row["source"].split(":")[0]]
        kind[0] += len(row["text"].encode())
        kind[1] += len(tokenizer.encode(row["text"]).ids)
    for name, (num_bytes, num_tokens) in sorted(sizes.items()):
        print(f"{name:8s} {num_bytes / num_tokens:.2f} bytes per token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus_dir", type=Path)
    parser.add_argument("model_dir", type=Path)
    arguments = parser.parse_args()
    tokenizer = build(sample(arguments.corpus_dir / "train.jsonl"))
    save(tokenizer, arguments.model_dir)
    report(tokenizer, arguments.corpus_dir / "heldout.jsonl")


if __name__ == "__main__":
    main()
