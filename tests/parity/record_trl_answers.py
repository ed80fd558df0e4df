"""Writes tests/fixtures/trl_answers.json: the tokens that TRL's trainers make of answers that are lists of messages.

python -m tests.parity.record_trl_answers    # needs trl; run in the root of the repository
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from tests.bloom_tokenizer import make_tokenizer
from tests.parity.record_trl_labels import TEMPLATES as CONVERSATION_TEMPLATES

FIXTURE = Path(__file__).parents[1] / "fixtures" / "trl_answers.json"
MAX_LENGTH = 90
"""Some answers are cut to it, and one prompt fills it."""
TEMPLATES = {
    "plain": CONVERSATION_TEMPLATES["plain"],
    "chatml": CONVERSATION_TEMPLATES["chatml"],
    # a prompt for generation ends otherwise than one that an answer follows
    "thoughts": CONVERSATION_TEMPLATES["chatml"].replace(
        "assistant\\n' }}{%- endif %}", "assistant\\n<think>' }}{% endif %}"
    ),
    # the last token of a prompt joins the first one of the answer
    "borders": (
        "{% for m in messages %}{{ m.role[0] + ':' + m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
        "{% if add_generation_prompt %}a:t{% endif %}"
    ),
}


def talk(*turns: str) -> list[dict[str, str]]:
    """Messages; "u text" is one of the user."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


def row(prompt: list[str], chosen: list[str], rejected: list[str]) -> dict[str, Any]:
    return {"prompt": talk(*prompt), "chosen": talk(*chosen), "rejected": talk(*rejected)}


PAIRS = [
    row(["u the end"], ["a and the end"], ["a on"]),
    row(["s Be brief.", "u a, b", "a 中文", "u why?"], ["a then"], ["a the \U0001f600 é"]),
    row(["u  in "], ["a th", "u so", "a in </s> it"], ["a the", "u why"]),
    row(["u a long prompt, " + "which goes on and on, " * 5], ["a x"], ["a y"]),
    row(["u x"], ["a an answer that is cut" + " at its end by the limit" * 5], ["a the"]),
]
IMPLICIT = [{name: pair["prompt"] + pair[name] for name in ("chosen", "rejected")} for pair in PAIRS] + [
    {"chosen": talk("u the", "a same"), "rejected": talk("u the", "a same")},
    {"chosen": talk("u the", "a longer", "u on", "a yes"), "rejected": talk("u the", "a longer")},
]
JUDGED = [
    {"prompt": pair["prompt"], "completion": pair["chosen"], "label": number % 2 == 0}
    for number, pair in enumerate(PAIRS)
]
ROWS = {"pairs": PAIRS, "implicit": IMPLICIT, "judged": JUDGED, "completions": JUDGED}


def recorded(kind: str, template: str, max_length: int | None) -> list[dict[str, list[int]]]:
    """For each answer of a trainer's batches, its tokens with the prompt's, and which of them are learned."""
    from datasets import Dataset
    from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

    kinds = {"judged": (KTOTrainer, KTOConfig), "completions": (SFTTrainer, SFTConfig)}
    trainer_class, config_class = kinds.get(kind, (DPOTrainer, DPOConfig))
    rows = ROWS[kind]
    if kind == "completions":
        rows = [{name: value for name, value in row.items() if name != "label"} for row in rows]
    with tempfile.TemporaryDirectory() as directory:
        make_tokenizer().with_chat_template(template).save(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        options = {"max_length": max_length, "use_cpu": True, "bf16": False, "report_to": "none"}
        options |= {"output_dir": directory, "per_device_train_batch_size": 2}
        config = BloomConfig(vocab_size=len(tokenizer), hidden_size=8, n_layer=1, n_head=1)
        reference = {} if kind == "completions" else {"ref_model": BloomForCausalLM(config)}
        trainer = trainer_class(
            model=BloomForCausalLM(config),
            **reference,
            args=config_class(**options),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        found = []
        for example in trainer.train_dataset:
            batch = trainer.data_collator([example])
            for number in range(2 if kind in ("pairs", "implicit") else 1):
                tokens, attended = (batch[name][number].tolist() for name in ("input_ids", "attention_mask"))
                if kind == "completions":
                    learned = [int(label >= 0) for label in batch["labels"][number].tolist()]
                else:
                    learned = batch["completion_mask"][number].tolist()
                length = sum(attended)
                found.append({"tokens": tokens[:length], "learned": learned[:length]})
        return found


if __name__ == "__main__":
    import transformers
    import trl

    answers = {
        f"{kind} {name} {length}": recorded(kind, template, length)
        for kind in ROWS
        for name, template in TEMPLATES.items()
        for length in (None, MAX_LENGTH)
    }
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    FIXTURE.write_text(json.dumps({"versions": versions, "answers": answers}) + "\n", encoding="utf-8")
