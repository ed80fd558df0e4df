"""Uses an installed bloomlm as its users do: trains, predicts, exports, runs the program, and serves.

    ENVIRONMENT/bin/python .ci/smoke.py

What the program and the server answer must be what the model predicts.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

BLOOMLM = str(Path(sys.executable).with_name("bloomlm"))
MODEL = ("--model_name_or_path", "builtin:tiny")
PROMPT = "Date: mardi 12 mars 2019\nISO:"
SERVER_SECONDS = 300


def main() -> None:
    """Run every step in a directory of its own."""
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        bloomlm(
            *(
                "finetune",
                *MODEL,
                "--lora",
                "--dataset_name_or_path",
                "builtin:dates",
                "--max_steps",
                "3",
                "--output_dir",
                "run",
            ),
            *("--max_tokens_per_batch", "512", "--learning_rate", "0.01"),
        )
        Path("prompts.jsonl").write_text(json.dumps({"src": PROMPT}) + "\n")
        bloomlm("merge", *MODEL, "--lora_path", "run", "--output_path", "merged")
        merged = ("--model_name_or_path", "merged")
        prompts = ("--data_file", "prompts.jsonl", "--max_new_tokens", "12")
        bloomlm("predict", *merged, *prompts, "--output_file", "predicted.jsonl")
        bloomlm("export", *merged, "--output_path", "inference/bloom")
        bloomlm("infer", "--model_dir", "inference", *prompts, "--output_file", "inferred.jsonl")
        answers = [json.loads(Path(f"{name}.jsonl").read_text())["completion"] for name in ("predicted", "inferred")]
        with server(*merged) as url:
            answers.append(complete(url))
    if len(set(answers)) != 1:
        raise SystemExit(f"model, program and server answer differently: {answers}")
    print(f"trained, predicted, exported, inferred and served: {answers[0]!r}")


def bloomlm(*words: str) -> None:
    """Run a verb; what it prints is shown only if it fails."""
    done = subprocess.run([BLOOMLM, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"bloomlm {' '.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}")


@contextlib.contextmanager
def server(*flags: str) -> Iterator[str]:
    """A server's address while it answers."""
    with Path("serve.log").open("wb") as log:
        process = subprocess.Popen([BLOOMLM, "serve", *flags, "--port", "0"], stdout=log, stderr=log)
    try:
        end = time.monotonic() + SERVER_SECONDS
        while True:
            printed = Path("serve.log").read_text()
            found = re.search(r"listening on (http://\S+?),", printed)
            if found and is_loaded(found[1]):
                break
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"bloomlm serve does not answer:\n{printed}")
            time.sleep(0.1)
        yield found[1]
    finally:
        process.terminate()
        process.wait()


def is_loaded(url: str) -> bool:
    """Whether the server's model is loaded; until then the status is 503."""
    try:
        return bool(urllib.request.urlopen(f"{url}/health").status == 200)
    except urllib.error.HTTPError:
        return False


def complete(url: str) -> str:
    """The server's completion of the prompt."""
    body = json.dumps({"model": "merged", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    text: str = json.load(urllib.request.urlopen(request))["choices"][0]["text"]
    return text


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
