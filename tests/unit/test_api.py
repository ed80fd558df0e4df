"""bloomlm.load, bloomlm.generate: texts in, texts out."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import bloomlm
from bloomlm.adapters.lora import LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.errors import AdapterError, CheckpointError, ConfigError, DataError, GenerationError
from bloomlm.generation.config import GenerationConfig, Sampling
from bloomlm.generation.generate import generate as generate_tokens
from tests.tiny_bloom import write_adapter, write_bloom

PROMPTS = ["the end", "and 中文 here", "a", "one in the other", "é"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bloom(tmp_path_factory.mktemp("api") / "model", eos_scale=3.0)


def test_generate_is_encode_generate_decode(base: Path) -> None:
    bloom = bloomlm.load(base)
    found = bloom.generate(PROMPTS, max_new_tokens=12)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        [expected] = generate_tokens(bloom.model, [bloom.tokenizer.encode(prompt)], GenerationConfig(max_new_tokens=12))
        assert completion.prompt == prompt
        assert (completion.tokens, completion.finish_reason) == (expected.tokens, expected.finish_reason)
        assert completion.completion == bloom.tokenizer.decode(expected.tokens)
    assert bloomlm.generate(base, PROMPTS[1], max_new_tokens=12) == found[1:2]
    assert bloomlm.generate(bloom, PROMPTS, max_new_tokens=12) == found


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_batch_size_changes_nothing(base: Path, batch_size: int) -> None:
    bloom = bloomlm.load(base)
    options = {"decode_strategy": "sampling", "temperature": 2.0, "num_return_sequences": 2, "max_new_tokens": 8}
    expected = bloom.generate(PROMPTS, batch_size=3, **options)
    assert bloom.generate(PROMPTS, batch_size=batch_size, **options) == expected
    assert [completion.prompt for completion in expected] == [prompt for prompt in PROMPTS for _ in range(2)]


def test_num_done_leaves_out_the_beginning_only(base: Path) -> None:
    bloom = bloomlm.load(base)
    config = GenerationConfig(strategy=Sampling(temperature=2.0), num_return_sequences=2, max_new_tokens=8)
    seen: list[tuple[int, int]] = []
    rest = list(
        bloom.completions(PROMPTS, config, batch_size=2, num_done=2, on_token=lambda i, token: seen.append((i, token)))
    )
    assert rest == list(bloom.completions(PROMPTS, config, batch_size=2))[4:]
    for index, completion in enumerate(rest, start=4):
        assert [token for i, token in seen if i == index] == completion.tokens


def test_stop_texts_are_cut_off(base: Path) -> None:
    bloom = bloomlm.load(base)
    [full] = bloom.generate("the end", max_new_tokens=20)
    stop = full.completion[5:8]
    [found] = bloom.generate("the end", max_new_tokens=20, stop=["never", stop])
    assert found.finish_reason == "stop"
    assert found.completion == full.completion[: full.completion.index(stop)]
    assert stop in bloom.tokenizer.decode(found.tokens)


def test_src_length_keeps_the_beginning_and_warns(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    bloom = bloomlm.load(base)
    ids = bloom.tokenizer.encode(PROMPTS[3])
    assert len(ids) > 4 and all(len(bloom.tokenizer.encode(PROMPTS[i])) <= 4 for i in (2, 4))
    prompts = [PROMPTS[2], PROMPTS[3], PROMPTS[4]]
    with caplog.at_level(logging.WARNING):
        found = bloom.generate(prompts, src_length=4, max_new_tokens=6)
    assert "1 of 3 prompts" in caplog.text and f"the longest has {len(ids)}" in caplog.text
    [expected] = generate_tokens(bloom.model, [ids[:4]], GenerationConfig(max_new_tokens=6))
    assert found[1].tokens == expected.tokens
    assert found[1].prompt == PROMPTS[3]
    caplog.clear()
    bloom.generate(prompts, src_length=len(ids), max_new_tokens=1)
    assert not caplog.records


@pytest.mark.parametrize("adapter", [LoraConfig(r=2), PrefixConfig(num_prefix_tokens=3)])
def test_adapters_change_the_completions(base: Path, tmp_path: Path, adapter: LoraConfig | PrefixConfig) -> None:
    path = write_adapter(tmp_path / "adapter", base, adapter)
    right, wrong = ("lora_path", "prefix_path") if isinstance(adapter, LoraConfig) else ("prefix_path", "lora_path")
    adapted = bloomlm.load(base, **{right: path}).generate(PROMPTS, max_new_tokens=12)
    assert adapted != bloomlm.load(base).generate(PROMPTS, max_new_tokens=12)
    with pytest.raises(AdapterError, match=f"give it as {right}"):
        bloomlm.load(base, **{wrong: path})
    assert bloomlm.load(base, adapter_path=path).generate(PROMPTS, max_new_tokens=12) == adapted
    for other in ("lora_path", "adapter_path"):
        with pytest.raises(ConfigError, match="one adapter"):
            bloomlm.load(base, prefix_path=path, **{other: path})


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype(base: Path, dtype: str | torch.dtype) -> None:
    bloom = bloomlm.load(base, dtype=dtype)
    assert {parameter.dtype for parameter in bloom.model.parameters()} == {torch.bfloat16}
    assert bloom.generate("the", max_new_tokens=3)[0].tokens


def test_refusals(base: Path, tmp_path: Path) -> None:
    bloom = bloomlm.load(base)
    with pytest.raises(GenerationError, match=r"prompt 2 of 2 is empty.*'<s>'"):
        bloom.generate(["a", ""])
    assert bloom.generate("<s>", max_new_tokens=2)[0].prompt == "<s>"
    with pytest.raises(GenerationError, match="top_p has no effect"):
        bloom.generate("a", top_p=0.5)
    with pytest.raises(GenerationError, match="batch_size is 0"):
        bloom.generate("a", batch_size=0)
    with pytest.raises(GenerationError, match="src_length is 0"):
        bloom.generate("a", src_length=0)
    with pytest.raises(ConfigError, match="dtype is 'fp32'; it can be float32"):
        bloomlm.load(base, dtype="fp32")
    with pytest.raises(CheckpointError):
        bloomlm.load(tmp_path / "nothing")


def test_finetune_names_unknown_and_missing_options() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'no_such_flag'.*learning_rate"):
        bloomlm.finetune(no_such_flag=1)
    with pytest.raises(ConfigError, match="needs output_dir"):
        bloomlm.finetune(do_train=True)


def without_run(report: bloomlm.EvaluationReport) -> dict[str, Any]:
    """The report as it is written, without what describes the run only."""
    return {name: value for name, value in json.loads(report.to_json()).items() if name != "run"}


def test_evaluate_gives_what_the_command_writes(base: Path, tmp_path: Path) -> None:
    from bloomlm.cli.evaluate import command
    from bloomlm.evaluation.report import read_report

    rows = tmp_path / "lambada.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{prompt} and the end"}) + "\n" for prompt in PROMPTS))
    lora = write_adapter(tmp_path / "lora", base, LoraConfig(r=2))
    words = ["--eval_path", str(rows), "--protocol", "lm_eval", "--seq_length", "6", "--limit", "4", "--device", "cpu"]
    options = {"eval_path": rows, "protocol": "lm_eval", "seq_length": 6, "limit": 4}
    for model, flags in (
        (base, []),
        (bloomlm.load(base), []),
        (bloomlm.load(base, lora_path=lora), ["--lora_path", str(lora)]),
    ):
        written = tmp_path / "command.json"
        words_of_model = ["--model_name_or_path", str(base), *flags, "--output_file", str(written)]
        result = CliRunner().invoke(command, [*words_of_model, *words])
        assert result.exit_code == 0, result.exception
        found = bloomlm.evaluate(model, output_file=str(tmp_path / "python.json"), **options)
        assert (
            without_run(found)
            == without_run(read_report(written))
            == without_run(read_report(tmp_path / "python.json"))
        )
        assert found.model["adapter"] == (str(lora) if flags else None)
        assert found.metrics["perplexity"].value > 1
        assert found.metrics["perplexity"].standard_error is not None


def test_evaluate_takes_an_exported_program(base: Path, tmp_path: Path, no_compiler: None) -> None:
    from bloomlm.export.program import export_program
    from bloomlm.runtime.program import Program

    bloom = bloomlm.load(base)
    export_program(bloom.model, bloom.tokenizer, tmp_path / "program" / "bloom", source="bloom", verify=False)
    (tmp_path / "wiki.txt").write_text("the end and one in the other , the end . " * 4)
    options = {"eval_path": tmp_path / "wiki.txt", "seq_length": 16}
    expected = bloomlm.evaluate(bloom, **options).metrics
    report = bloomlm.evaluate(Program(tmp_path / "program" / "bloom"), **options)
    assert report.model["name"] == str(tmp_path / "program" / "bloom")
    assert {name: metric.value for name, metric in report.metrics.items()} == pytest.approx(
        {name: metric.value for name, metric in expected.items()}, rel=1e-5
    )


def test_evaluate_finds_the_data_before_it_loads(base: Path, tmp_path: Path) -> None:
    def load() -> bloomlm.LoadedModel:
        raise AssertionError("the model was loaded first")

    with pytest.raises(DataError, match="no such file"):
        bloomlm.evaluate(load, eval_path=tmp_path / "nothing.txt")
    (tmp_path / "lambada.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="line 1: expected an object"):
        bloomlm.evaluate(load, eval_path=tmp_path / "lambada.jsonl")
    with pytest.raises(ConfigError, match=r"unknown option 'no_such_flag' of evaluate.*seq_length"):
        bloomlm.evaluate(load, no_such_flag=1)
    with pytest.raises(ConfigError, match="--limit is 0; expected at least 1"):
        bloomlm.evaluate(load, eval_path="f", limit=0)
    with pytest.raises(ConfigError, match="--protocol is 'ppl'; expected one of reference, lm_eval, gptq"):
        bloomlm.evaluate(load, eval_path="f", protocol="ppl")
    with pytest.raises(ConfigError, match="--protocol lm_eval_tasks needs --tasks"):
        bloomlm.evaluate(load, eval_path="f", protocol="lm_eval_tasks")


def test_page_about_evaluation_runs_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
    code, printed = re.findall(r"```python\n(.*?)```\n\nprints\n\n```\n(.*?)```", page, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/evaluation.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_an_unknown_prefix_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prefix_layout is 'newer'; expected one of old, new"):
        bloomlm.load("builtin:tiny", prefix_path=tmp_path, prefix_layout="newer")
