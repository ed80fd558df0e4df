"""transformers opens an extended model and its tokenizer, to equal logits and ids."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bloomlm.checkpoint.reader import load_model
from bloomlm.cli.extend import ExtendConfig, extend
from bloomlm.data.tokenizer import Tokenizer
from tests.tiny_bloom import write_bloom
from tests.unit.test_vocabulary_extend import NUM_NEW, texts


def test_transformers_opens_an_extended_model(tmp_path: Path) -> None:
    base = write_bloom(tmp_path / "base")
    (tmp_path / "new.txt").write_text("\n".join(texts()), encoding="utf-8")
    flags = {"model_name_or_path": str(base), "output_path": str(tmp_path / "out"), "held_out_bytes": 0}
    extend(ExtendConfig(**flags, corpus=(str(tmp_path / "new.txt"),), add_tokens=NUM_NEW))
    theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), load_model(tmp_path / "out")
    tokenizer, own = AutoTokenizer.from_pretrained(tmp_path / "out"), Tokenizer.from_directory(tmp_path / "out")
    num_old = Tokenizer.from_directory(base).vocab_size
    for text in texts(4, 20):
        ids = own.encode(text)
        assert any(token >= num_old for token in ids)
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        with torch.no_grad():
            tokens = torch.tensor([ids])
            torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
