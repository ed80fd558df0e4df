"""The flags of `bloomlm evaluate`, and what cannot be asked for together."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from bloomlm.errors import ConfigError
from bloomlm.flags import DeviceFlags, ModelFlags, flag, same_flag

_ADAPTER_IN_PROGRAM = "adapters are put into a program when it is exported; leave the flag out"
_NOT_OF_PROGRAMS = {
    "lora_path": _ADAPTER_IN_PROGRAM,
    "prefix_path": _ADAPTER_IN_PROGRAM,
    "prefix_layout": _ADAPTER_IN_PROGRAM,
    "trained_tensor_parallel_degree": _ADAPTER_IN_PROGRAM,
    "paddle_tokenization": "a program has its own tokenizer beside it; leave the flag out",
    "dtype": "a program keeps the precision that it was exported in; leave the flag out, or export it with --dtype",
    "load_autodist": "auto_dist files hold a model; give their directory as --model_name_or_path",
    "device": "exported programs run on the CPU; leave the flag out",
    "tensor_parallel_degree": "a program cannot be divided among processes; leave the flag out, and each process of "
    "torchrun takes other examples",
}
"""Flags that say how a model is loaded, and what to do instead."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DeviceFlags, ModelFlags):
    """What to evaluate on what."""

    model_name_or_path: str = same_flag(ModelFlags, "model_name_or_path", default="")
    model_type: str | None = flag("model", None, "bloom; PaddleNLP's command gives it")
    load_autodist: bool = flag("model", False, "the directory holds PaddleNLP's auto_dist files")
    model_dir: Path | None = flag(
        "model", None, "instead of --model_name_or_path: directory that bloomlm export wrote a program into"
    )
    model_prefix: str = flag("model", "bloom", "name of the program in it")

    eval_path: str | None = flag(
        "data", None, "wiki.valid.tokens, lambada_test.jsonl, ...; or wikitext-2, wikitext-103 or lambada from the hub"
    )
    cloze_eval: bool | None = flag("data", None, "guess last words (LAMBADA); by default so for .jsonl files")
    limit: int | None = flag("data", None, "evaluate the first so many examples, documents or windows only")

    protocol: Literal["reference", "lm_eval", "gptq"] = flag(
        "protocol", "reference", "whose definition: PaddleNLP's run_eval.py, lm-eval's tasks, or GPTQ's perplexity"
    )
    seq_length: int | None = flag("protocol", None, "most tokens the model sees [default: 512; lm_eval and gptq: 2048]")
    overlapping_eval: int | None = flag(
        "protocol", None, "reference, WikiText: tokens from one window to the next [default: 32]"
    )

    do_generation: bool = flag("generation", False, "answer the rows of eval_path (src and tgt) and score the answers")
    src_length: int | None = flag("generation", None, "most tokens of a prompt, as in training [default: 512]")
    tgt_length: int | None = flag("generation", None, "most tokens of an answer, </s> included [default: 512]")
    prompt_template: str | None = flag("generation", None, "makes the prompt of each row, as in training")

    tasks: tuple[str, ...] = flag("lm-eval", (), "tasks that lm-eval runs (pip install 'bloomlm[lm_eval]')")
    num_fewshot: int | None = flag("lm-eval", None, "worked examples before each question; by default the task's own")
    include_path: Path | None = flag("lm-eval", None, "directory with more tasks of your own")

    output_file: Path | None = flag(
        "output", None, "write the report (.json, and .md beside it); a stopped evaluation goes on from there"
    )
    compare: tuple[str, ...] = flag("output", (), "two reports, side by side; nothing is evaluated")
    logging_steps: int = flag("output", 10, "without a terminal: batches from one line of progress to the next")

    batch_size: int = flag(
        "computing", 8, "windows of seq_length tokens at once; changes the speed, and is halved when memory runs out"
    )
    tensor_parallel_degree: int = flag(
        "computing", 1, "processes that share a model; the others have copies and take other examples"
    )
    seed: int | None = flag("computing", None, "accepted; an evaluation draws nothing")

    @property
    def is_lambada(self) -> bool:
        """Whether last words are guessed."""
        if self.cloze_eval is not None:
            return self.cloze_eval
        name = self.eval_path or ""
        return name.partition(":")[0] == "lambada" or Path(name).suffix.lower() in (".jsonl", ".json", ".csv")


def check_config(config: EvaluateConfig) -> tuple[str, ...]:
    """Refuse what contradicts itself or cannot be done, before anything is loaded.

    Returns:
        What the user should know: flags that have no effect.

    Raises:
        ConfigError: naming the flags.
    """
    if config.compare:
        if len(config.compare) != 2:
            raise ConfigError(f"--compare takes two reports, found {len(config.compare)}: --compare a.json b.json")
        return tuple(f"--{name} has no effect with --compare" for name in _given(config) if name != "compare")
    _check_model(config)
    kinds = [name for name, given in (("--tasks", config.tasks), ("--eval_path", config.eval_path)) if given]
    if len(kinds) != 1:
        found = " and ".join(kinds) or "neither"
        raise ConfigError(f"found {found}; expected --eval_path FILE (or wikitext-2, lambada), or --tasks of lm-eval")
    if config.do_generation and not config.eval_path:
        raise ConfigError("--do_generation needs --eval_path with rows to answer, such as test.jsonl")
    for name in ("limit", "batch_size", "seq_length", "logging_steps", "src_length", "tgt_length"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} is {value}; expected a whole number from 1")
    if config.output_file is not None and config.output_file.suffix != ".json":
        raise ConfigError(f"--output_file {config.output_file}: expected a name that ends in .json")
    if config.protocol == "gptq" and config.is_lambada and not config.do_generation and config.eval_path:
        raise ConfigError("--protocol gptq defines perplexity on WikiText only; for LAMBADA use reference or lm_eval")
    return _without_effect(config)


def _check_model(config: EvaluateConfig) -> None:
    if config.model_type not in (None, "bloom"):
        raise ConfigError(f"--model_type {config.model_type}: bloomlm evaluates BLOOM only; expected bloom")
    if config.model_dir is not None:
        _check_program(config)
        return
    if not config.model_name_or_path:
        raise ConfigError(
            "missing --model_name_or_path (builtin:tiny, a directory, or a hub name), or --model_dir with an exported "
            "program"
        )
    if config.load_autodist:
        directory = Path(config.model_name_or_path).expanduser()
        if not list(directory.glob("auto_dist*.pdparams")):
            raise ConfigError(
                f"--load_autodist: {config.model_name_or_path} holds no auto_dist*.pdparams; leave the flag out to "
                "read whatever form the model has"
            )


def _check_program(config: EvaluateConfig) -> None:
    """Refuse what says how to load a model where a program is given, which has all that in it."""
    if config.model_name_or_path:
        raise ConfigError(
            f"found --model_dir {config.model_dir} and --model_name_or_path {config.model_name_or_path}; give one: an "
            "exported program or a model"
        )
    given = _given(config)
    for name, why in _NOT_OF_PROGRAMS.items():
        if name in given and not (name == "device" and config.device == "cpu"):
            raise ConfigError(f"--{name} with --model_dir: {why}")


def _without_effect(config: EvaluateConfig) -> tuple[str, ...]:
    windows = bool(config.eval_path) and not config.do_generation
    given = _given(config)
    sliding = windows and config.protocol == "reference" and not config.is_lambada
    acting = {
        "protocol": (windows, "WikiText or LAMBADA as --eval_path"),
        "overlapping_eval": (sliding, "--protocol reference on WikiText"),
        "cloze_eval": (windows, "a protocol"),
        "seq_length": (windows or bool(config.tasks), "a protocol or --tasks"),
        "logging_steps": (not config.tasks, "--eval_path"),
        "src_length": (config.do_generation, "--do_generation"),
        "tgt_length": (config.do_generation, "--do_generation"),
        "prompt_template": (config.do_generation, "--do_generation"),
        "num_fewshot": (bool(config.tasks), "--tasks"),
        "include_path": (bool(config.tasks), "--tasks"),
        "seed": (False, "random numbers, and an evaluation draws none"),
        "model_prefix": (config.model_dir is not None, "--model_dir"),
    }
    return tuple(
        f"--{name} has no effect without {needed}"
        for name, (acts, needed) in acting.items()
        if name in given and not acts
    )


def _given(config: EvaluateConfig) -> list[str]:
    """Flags that are not at their defaults."""
    return [item.name for item in fields(config) if getattr(config, item.name) != item.default]
