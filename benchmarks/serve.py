"""Servers on a random model of bloom-560m's shape, over HTTP: `bloomlm serve` beside other servers.

    python benchmarks/serve.py --parts rates --sides eager,pt2,llama.cpp-F32 --rounds 3
    python benchmarks/serve.py --quick

Each server runs in a process of its own with the same number of threads, and the sides take turns. The client is one
process without a library (serve_client.py). Prompts are new for each measurement, ids except for transformers, which
takes text. All answers are greedy and streamed, and have the same number of tokens. Parts:

- rates: output tokens per second, time to the first token and between tokens, peak memory, by the number of streams.
- http_overhead: the rate over HTTP beside that of the DecodeSession alone on the same prompts in the same steps, in a
  process of its own.
- long_prompt: streams run, and a long prompt arrives: their longest wait beside the time of a chunk of the prompt.
- prefix: requests with a common beginning, one after another: first token of the first and of the later ones.
- lora: as many streams on the base model as divided among it and four LoRAs of rank 8 (eager only).
- lookup: --prompt_lookup 8 beside none, where each token is the same one, and in the model's own greedy text; tokens
  per second after the first.

What sides read is made on first use, beside the random model. A peer without its variable (serve_sides.py) is left out
with a note. The tables are Markdown: medians over the rounds. --quick tries everything on the built-in model.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from common import counted, machine, median, record, run_side
from serve_client import Answer, rates, stream_all
from serve_sides import OURS, Server, adapters, missing, model_directory, program, serving, words

SIDES = "eager,pt2,pt2-int8,llama.cpp-F32,llama.cpp-Q8_0,vllm,transformers"
NUM_LORAS = 4
GUESSES = 8
REPEATED_TOKEN = 300
Row = dict[str, float]


class Prompts:
    """New random prompts, the same ones in every run.

    Args:
        args: the size of the model.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._random = np.random.default_rng(0)
        self._vocab_size = 2048 if args.size == "tiny" else 250_000
        self._words = words(args)

    def of(self, server: Server, num_tokens: int) -> list[int] | str:
        """A prompt in the form that the server takes."""
        return self.one(num_tokens) if server.takes_ids else "".join(self._random.choice(self._words, num_tokens))

    def one(self, num_tokens: int) -> list[int]:
        return self._random.integers(4, self._vocab_size, num_tokens).tolist()


def body_of(server: Server, prompt: list[int] | str, num_tokens: int, **fields: Any) -> dict[str, Any]:
    """A greedy request for that many tokens."""
    whole = {"temperature": 0, "max_tokens": num_tokens, **({"ignore_eos": True} if server.takes_ids else {})}
    return {"model": server.model, "prompt": prompt, **whole, **fields}


def ask(server: Server, prompts: Sequence[list[int] | str], num_tokens: int, **fields: Any) -> list[Answer]:
    """Send prompts at once, and check that every answer is whole."""
    answers = stream_all(server.url, [body_of(server, prompt, num_tokens, **fields) for prompt in prompts])
    found = [answer.num_tokens for answer in answers]
    assert found == [num_tokens] * len(prompts), f"expected answers of {num_tokens} tokens, found {found}"
    return answers


def warm_up(server: Server, args: argparse.Namespace, prompts: Prompts) -> None:
    for count in (1, 2):
        ask(server, [prompts.of(server, args.prompt_tokens) for _ in range(count)], 4)


def measure_rates(args: argparse.Namespace, side: str, round_number: int) -> dict[str, Row]:
    prompts, found = Prompts(args), {}
    with serving(args, side) as server:
        warm_up(server, args, prompts)
        for count in args.streams:
            asked = [prompts.of(server, args.prompt_tokens) for _ in range(count)]
            found[f"{side}, {counted(count, 'stream')}"] = rates(ask(server, asked, args.new_tokens))
        peak = server.peak_memory_bytes() / 1e9
    return {name: {**row, "peak_memory_gb": peak} for name, row in found.items()}


def measure_http_overhead(args: argparse.Namespace, side: str, round_number: int) -> dict[str, Row]:
    def over_http() -> float:
        most = ("--max_model_len", str(args.prompt_tokens + args.new_tokens))  # rows as long as the session's
        with serving(args, side, "--prefix_caching", "False", *most) as server:
            prompts = Prompts(args)
            warm_up(server, args, prompts)
            asked = [prompts.one(args.prompt_tokens) for _ in range(args.streams[-1])]
            return rates(ask(server, asked, args.new_tokens))["tokens_per_second"]

    def alone() -> float:
        return run_side(__file__, side, [*shared_flags(args), "--parts", "session"], args.threads)["tokens_per_second"]

    if round_number % 2:
        session, http = alone(), over_http()
    else:
        http, session = over_http(), alone()
    return {
        f"{side}, {counted(args.streams[-1], 'stream')}": {
            "http_tokens_per_second": http,
            "session_tokens_per_second": session,
            "http_over_session": http / session,
        }
    }


def session_alone(args: argparse.Namespace) -> Row:
    """The same requests in a DecodeSession of this process, in steps of as many tokens as the server's."""
    import torch

    from bloomlm.allocator import keep_freed_memory
    from bloomlm.api import load
    from bloomlm.generation.config import GenerationConfig
    from bloomlm.generation.session import DecodeSession
    from bloomlm.runtime import Program
    from bloomlm.serving.options import EngineOptions

    keep_freed_memory()  # as every command does
    torch.set_num_threads(args.threads)
    eager = args.side == "eager"
    model = load(model_directory(args), dtype="float32").model if eager else Program(program(args, args.side)).model
    prompts, count = Prompts(args), args.streams[-1]

    def run(count: int, num_tokens: int) -> float:
        config = GenerationConfig(max_new_tokens=num_tokens, ignore_eos=True)
        asked = [prompts.one(args.prompt_tokens) for _ in range(count)]
        session = DecodeSession(model, max_rows=count, max_tokens=args.prompt_tokens + num_tokens)
        start = time.perf_counter()
        handles = [handle for prompt in asked for handle in session.open(prompt, config)]
        total = 0
        while not session.is_empty:
            total += len(session.step(reads(session, handles)))
        return total / (time.perf_counter() - start)

    def reads(session: DecodeSession, handles: Sequence[int]) -> dict[int, int]:
        unread = {handle: session.num_unread(handle) for handle in handles if session.num_unread(handle)}
        room = EngineOptions.max_step_tokens - (len(handles) - len(unread))
        chunks = {}
        for handle, num_tokens in unread.items():
            chunks[handle] = min(room, num_tokens)
            room -= chunks[handle]
        return {handle: size for handle, size in chunks.items() if size}

    with torch.inference_mode():
        run(1, 4), run(2, 4)
        return {"tokens_per_second": run(count, args.new_tokens)}


def measure_long_prompt(args: argparse.Namespace, side: str, round_number: int) -> dict[str, Row]:
    """Four streams, and a long prompt that comes among them."""
    prompts = Prompts(args)
    with serving(args, side, "--prefix_caching", "False", "--max_step_tokens", str(args.chunk_tokens)) as server:
        warm_up(server, args, prompts)
        (alone,) = ask(server, [prompts.one(args.long_tokens)], 2)
        chunk = alone.first / -(-args.long_tokens // args.chunk_tokens)
        calm = ask(server, [prompts.one(args.prompt_tokens) for _ in range(4)], args.new_tokens)
        usual = statistics.median(gap for answer in calm for gap in answer.gaps)
        asked = [body_of(server, prompts.one(args.prompt_tokens), args.new_tokens) for _ in range(4)]
        late = body_of(server, prompts.one(args.long_tokens), 2)
        arrival = max(answer.first for answer in calm) + 3 * usual
        *streams, _ = stream_all(server.url, [*asked, late], [0, 0, 0, 0, arrival])
    longest = max(gap for answer in streams for gap in answer.gaps)
    return {
        f"{side}, chunks of {args.chunk_tokens}": {
            "chunk_ms": 1000 * chunk,
            "usual_gap_ms": 1000 * usual,
            "longest_gap_ms": 1000 * longest,
            "longest_over_chunk_and_gap": longest / (chunk + usual),
        }
    }


def measure_prefix(args: argparse.Namespace, side: str, round_number: int) -> dict[str, Row]:
    prompts = Prompts(args)
    with serving(args, side) as server:
        warm_up(server, args, prompts)
        common = prompts.one(args.prefix_tokens)
        firsts = [ask(server, [common + prompts.one(16)], 2)[0].first for _ in range(16)]
    later = statistics.median(firsts[1:])
    name = f"{side}, {args.prefix_tokens} common tokens"
    return {name: {"first_ms": 1000 * firsts[0], "later_ms": 1000 * later, "times_sooner": firsts[0] / later}}


def measure_lora(args: argparse.Namespace, side: str, round_number: int) -> dict[str, Row]:
    if side != "eager":
        return {}
    found = adapters(args, NUM_LORAS, args.lora_layers)
    flags = [word for name, path in found.items() for word in ("--lora", f"{name}={path}")]
    prompts, rows = Prompts(args), {}
    with serving(args, side, *flags) as server:
        warm_up(server, args, prompts)
        models = [server.model, *found]
        for count in args.streams:
            speed = {}
            for kind, names in (("base", models[:1]), ("mixed", models)):
                # The first requests stack the matrices of their adapters.
                for num_tokens in (2, args.new_tokens):
                    asked = [
                        body_of(server, prompts.one(args.prompt_tokens), num_tokens, model=names[place % len(names)])
                        for place in range(count)
                    ]
                    speed[kind] = rates(stream_all(server.url, asked))["tokens_per_second"]
            rows[f"{side}, {counted(count, 'stream')}"] = {
                "base_tokens_per_second": speed["base"],
                "mixed_tokens_per_second": speed["mixed"],
                "mixed_over_base": speed["mixed"] / speed["base"],
            }
    return rows


def decoding_rate(answer: Answer) -> float:
    """Tokens per second after the first one."""
    return (answer.num_tokens - 1) / (answer.ended - answer.events[0])


def measure_lookup(args: argparse.Namespace, side: str, round_number: int) -> dict[str, Row]:
    # A bias makes the model repeat one token, so that every guess is right.
    kinds: dict[str, dict[str, Any]] = {"repeating": {"logit_bias": {str(REPEATED_TOKEN): 100}}, "greedy": {}}
    speed: dict[tuple[str, int], float] = {}
    for guesses in (0, GUESSES):
        prompts = Prompts(args)
        with serving(args, side, "--prompt_lookup", str(guesses)) as server:
            warm_up(server, args, prompts)
            for kind, fields in kinds.items():
                asked = [prompts.one(args.prompt_tokens) for _ in range(4)]
                answers = [ask(server, [prompt], args.new_tokens, **fields)[0] for prompt in asked]
                speed[kind, guesses] = statistics.median(decoding_rate(answer) for answer in answers)
    return {
        f"{side}, {kind} text": {
            "plain_tokens_per_second": speed[kind, 0],
            "lookup_tokens_per_second": speed[kind, GUESSES],
            "lookup_over_plain": speed[kind, GUESSES] / speed[kind, 0],
        }
        for kind in kinds
    }


PARTS: dict[str, Callable[[argparse.Namespace, str, int], dict[str, Row]]] = {
    "rates": measure_rates,
    "http_overhead": measure_http_overhead,
    "long_prompt": measure_long_prompt,
    "prefix": measure_prefix,
    "lora": measure_lora,
    "lookup": measure_lookup,
}


def run_part(args: argparse.Namespace, part: str, sides: Sequence[str]) -> dict[str, Row]:
    """Medians over the rounds; the sides take turns."""
    rows: dict[str, list[Row]] = {}
    for round_number in range(args.rounds):
        for side in sides if round_number % 2 == 0 else list(reversed(sides)):
            for name, row in PARTS[part](args, side, round_number).items():
                rows.setdefault(name, []).append(row)
                shown = ", ".join(f"{key} {value:.4g}" for key, value in row.items())
                print(f"  {part}, round {round_number + 1}, {name}: {shown}", file=sys.stderr, flush=True)
    return {name: {key: median(found, key) for key in found[0]} for name, found in rows.items()}


def print_table(part: str, rows: dict[str, Row]) -> None:
    keys = list(next(iter(rows.values())))
    print(f"\n| {part} | {' | '.join(keys)} |\n|{'---|' * (1 + len(keys))}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[key]:.2f}' for key in keys)} |")


def print_ratios(rows: dict[str, Row]) -> None:
    """Output tokens per second of each side of ours over each peer."""
    speed = {tuple(name.split(", ")): row["tokens_per_second"] for name, row in rows.items()}
    pairs = [(our, peer) for our, _ in speed for peer, _ in speed if our in OURS and peer not in OURS]
    for our, peer in dict.fromkeys(pairs):
        shown = [f"{speed[our, count] / speed[peer, count]:.2f} ({count})" for side, count in speed if side == our]
        print(f"{our} / {peer}: {', '.join(shown)}")


def shared_flags(args: argparse.Namespace) -> list[str]:
    names = ("size", "layers", "threads", "new_tokens", "prompt_tokens")
    return [*(f"--{name}={getattr(args, name)}" for name in names), f"--streams={','.join(map(str, args.streams))}"]


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", help="internal: measure a DecodeSession in this process")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--sides", default=SIDES)
    parser.add_argument("--size", default="560m")
    parser.add_argument("--layers", type=int, default=0, help="a shorter model of the same width")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", default="1,4,8,16")
    parser.add_argument("--lora_layers", choices=("query_key_value", "all"), default="query_key_value")
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--long_tokens", type=int, default=2000)
    parser.add_argument("--chunk_tokens", type=int, default=512)
    parser.add_argument("--prefix_tokens", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="everything once on the built-in model")
    args = parser.parse_args()
    if args.quick:
        args.size, args.sides, args.rounds, args.streams = "tiny", "eager", 1, "1,4"
        args.prompt_tokens, args.new_tokens, args.long_tokens, args.chunk_tokens, args.prefix_tokens = (
            16,
            8,
            300,
            80,
            64,
        )
    args.streams = [int(count) for count in args.streams.split(",")]
    return args


def main() -> None:
    args = read_arguments()
    if args.side:
        print(json.dumps(session_alone(args)))
        return
    sides = []
    for side in args.sides.split(","):
        if reason := missing(side):
            print(f"left out: {side} ({reason})", file=sys.stderr, flush=True)
        else:
            sides.append(side)
    print(
        f"bloom-{args.size} shape, {args.threads} threads, prompts of {args.prompt_tokens}, "
        f"{args.new_tokens} new tokens; {machine()}"
    )
    recorded = {}
    for part in args.parts.split(","):
        chosen = sides if part == "rates" else [side for side in sides if side in OURS]
        rows = run_part(args, part, chosen)
        if rows:
            print_table(part, rows)
        if part == "rates":
            print_ratios(rows)
        recorded |= {", ".join(reversed(name.split(", "))): [row] for name, row in rows.items()}
    record(recorded)


if __name__ == "__main__":
    main()
