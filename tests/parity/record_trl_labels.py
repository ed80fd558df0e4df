"""Writes tests/fixtures/trl_labels.json: what TRL's SFTTrainer learns of conversations (assistant_only_loss).

python -m tests.parity.record_trl_labels    # needs trl; run in the root of the repository
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from bloomlm.data.chat_template import PLAIN_TEMPLATE
from tests.bloom_tokenizer import make_tokenizer

FIXTURE = Path(__file__).parents[1] / "fixtures" / "trl_labels.json"
TEMPLATES = {
    "plain": PLAIN_TEMPLATE,
    "chatml": (
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.role == 'assistant' %}"
        "{%- generation %}{{- message.content + eos_token + '\\n' }}{%- endgeneration %}{%- else %}"
        "{{- message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    ),
    # A token spans the border of an answer, and an answer has two blocks. No block ends with a character of several
    # tokens, of which transformers marks the first alone.
    "borders": (
        "{% for m in messages %}{% if m.role == 'assistant' %}th{% generation %}e {{ m.content }}.{% endgeneration %}!"
        "{% generation %}{{ eos_token }}{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }} {% endif %}{% endfor %}"
    ),
}
CONVERSATIONS = [
    [("user", "the end"), ("assistant", "and the end")],
    [
        ("system", "Be brief."),
        ("user", "a, b"),
        ("assistant", "中文, 世界"),
        ("user", "why?"),
        ("assistant", "\U0001f600 é"),
    ],
    [("user", " the "), ("assistant", "  spaces\n\n"), ("user", "in </s> it"), ("assistant", "(x)"), ("user", "so?")],
    [("assistant", "hello"), ("user", "on"), ("assistant", "."), ("assistant", "the the")],
]


def rows() -> list[dict[str, Any]]:
    return [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in CONVERSATIONS]


def labels_of_trl(template: str) -> list[dict[str, list[int]]]:
    from datasets import Dataset
    from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as directory:
        make_tokenizer().with_chat_template(template).save(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        options = {"assistant_only_loss": True, "max_length": None, "use_cpu": True, "bf16": False, "report_to": "none"}
        options["output_dir"] = directory
        trainer = SFTTrainer(
            model=BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=8, n_layer=1, n_head=1)),
            args=SFTConfig(**options),
            train_dataset=Dataset.from_list(rows()),
            processing_class=tokenizer,
        )
        batches = [trainer.data_collator([example]) for example in trainer.train_dataset]
        return [{name: batch[name][0].tolist() for name in ("input_ids", "labels")} for batch in batches]


if __name__ == "__main__":
    import transformers
    import trl

    found = {name: labels_of_trl(template) for name, template in TEMPLATES.items()}
    versions = {"trl": trl.__version__, "transformers": transformers.__version__}
    FIXTURE.write_text(json.dumps({"versions": versions, "labels": found}) + "\n", encoding="utf-8")
