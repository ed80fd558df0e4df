"""Step 3: pretrain builtin:tiny from scratch on the corpus.

    python recipes/builtin/pretrain.py CORPUS_DIR MODEL_DIR [--steps N]

MODEL_DIR holds the tokenizer already. Documents, each closed by </s>, are laid end to end in a new order every epoch
and cut into windows; every token of a window learns the next one. One thread and fixed seeds: the same machine
writes the same bytes. Writes config.json, generation_config.json, model.safetensors (float16) and training.json (the
figures of the model card).
"""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.config import BloomConfig
from bloomlm.model.documents import Documents

SEED = 20_242
WINDOW_TOKENS = 256
WINDOWS_PER_STEP = 8
STEPS = 5_000
WARMUP_STEPS = 150
LEARNING_RATE = 2e-3
LAST_LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.1

EOS = 2


def model_config(vocab_size: int) -> BloomConfig:
    """The shape of builtin:tiny."""
    return BloomConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        n_layer=4,
        n_head=8,
        initializer_range=0.04,
        dtype="float16",
        extra={"architectures": ["BloomForCausalLM"], "model_type": "bloom", "use_cache": True},
    )


def read_documents(path: Path, tokenizer: Tokenizer) -> list[tuple[str, int, Tensor]]:
    """(kind of source, bytes, tokens with </s>) of each document."""
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    encodings = tokenizer.encode_batch([row["text"] for row in rows])
    return [
        (row["source"].split(":")[0], len(row["text"].encode()), torch.tensor([*encoding.ids, EOS]))
        for row, encoding in zip(rows, encodings, strict=True)
    ]


def windows(documents: list[Tensor], generator: torch.Generator) -> Iterator[Tensor]:
    """Endless [WINDOWS_PER_STEP, WINDOW_TOKENS + 1] batches."""
    while True:
        order = torch.randperm(len(documents), generator=generator).tolist()
        stream = torch.cat([documents[index] for index in order])
        num_windows = (len(stream) - 1) // WINDOW_TOKENS
        starts = torch.randperm(num_windows, generator=generator)[:, None] * WINDOW_TOKENS
        epoch = stream[starts + torch.arange(WINDOW_TOKENS + 1)]
        yield from (batch for batch in epoch.split(WINDOWS_PER_STEP) if len(batch) == WINDOWS_PER_STEP)


def learning_rate_at(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to LAST_LEARNING_RATE."""
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return LAST_LEARNING_RATE + (LEARNING_RATE - LAST_LEARNING_RATE) * (1 + math.cos(math.pi * progress)) / 2


def train(model: BloomForCausalLM, documents: list[Tensor], steps: int) -> None:
    """Run the optimizer, printing a line every 100 steps."""
    decayed = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    layout = Documents.equal(WINDOWS_PER_STEP, WINDOW_TOKENS)
    batches = windows(documents, torch.Generator().manual_seed(SEED))
    started, total = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, steps)
        batch = next(batches)
        hidden = model.transformer(batch[:, :-1].flatten(), layout)
        loss = F.cross_entropy(model.logits(hidden), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps} loss {total / 100:.3f} {time.monotonic() - started:.0f} s", flush=True)
            total = 0.0


@torch.no_grad()
def bits_per_byte(model: BloomForCausalLM, documents: list[tuple[str, int, Tensor]]) -> dict[str, float]:
    """Held-out bits per byte by kind of source: every token of a document after a </s>, in windows without overlap."""
    bits: defaultdict[str, float] = defaultdict(float)
    num_bytes: defaultdict[str, int] = defaultdict(int)
    for kind, size, tokens in documents:
        stream = F.pad(tokens, (1, 0), value=EOS)
        for start in range(0, len(tokens), WINDOW_TOKENS):
            part = stream[start : start + WINDOW_TOKENS + 1]
            hidden = model.transformer(part[:-1], Documents.packed([len(part) - 1]))
            nats = F.cross_entropy(model.logits(hidden), part[1:], reduction="sum").item()
            for name in (kind, "all"):
                bits[name] += nats / math.log(2)
        for name in (kind, "all"):
            num_bytes[name] += size
    return {kind: round(bits[kind] / num_bytes[kind], 3) for kind in sorted(bits)}


def save(model: BloomForCausalLM, directory: Path) -> None:
    """Write the model as Hugging Face tools expect it, weights in float16."""
    config = model.config
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = {"_from_model_config": True, **ids}
    for name, content in (("config.json", config.to_dict()), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus_dir", type=Path)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(arguments.model_dir / "tokenizer.json"))
    documents = read_documents(arguments.corpus_dir / "train.jsonl", tokenizer)
    held_out = read_documents(arguments.corpus_dir / "heldout.jsonl", tokenizer)
    num_tokens = sum(len(tokens) for _, _, tokens in documents)
    print(f"{len(documents)} documents, {num_tokens} tokens an epoch")
    model = BloomForCausalLM(model_config(tokenizer.get_vocab_size()))
    model.init_weights(torch.Generator().manual_seed(SEED))
    started = time.monotonic()
    train(model, [tokens for _, _, tokens in documents], arguments.steps)
    seconds = time.monotonic() - started
    save(model, arguments.model_dir)
    model.load_state_dict({name: t.half().float() for name, t in model.state_dict().items()})
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": arguments.steps,
        "tokens_seen": arguments.steps * WINDOWS_PER_STEP * WINDOW_TOKENS,
        "tokens_per_epoch": num_tokens,
        "training_seconds": round(seconds),
        "heldout_bits_per_byte": bits_per_byte(model, held_out),
    }
    print(json.dumps(figures))
    (arguments.model_dir / "training.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
