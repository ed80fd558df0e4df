"""The flags of `bloomlm finetune`, under the names that PaddleNLP's finetune_generation.py gave them.

Plain values: what they do together is decided in checks.py, which fills in what depends on other flags.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def _flag(section: str, default: T, help: str, **more: Any) -> T:
    """A dataclass field that carries its heading and its line of help."""
    metadata = {"section": section, "help": help, **more}
    value: T = field(default=default, metadata=metadata)
    return value


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything a fine-tuning run can be told; each field is a flag and a key of --config."""

    # fmt: off
    model_name_or_path: str = _flag("model", "bigscience/bloom-560m",
        "what to start from: builtin:tiny, a directory, or a hub name")
    paddle_tokenization: bool = _flag("model", False,
        "with vocab.json and merges.txt: cut words as PaddleNLP did, not as BLOOM")

    train_file: str | None = _flag("data", None,
        "examples to learn: .jsonl, .json or .csv with src/tgt, instruction/output, prompt/completion, ... in each row")
    eval_file: str | None = _flag("data", None, "examples to evaluate on, in the same formats")
    dataset_name_or_path: str | None = _flag("data", None,
        "both at once: builtin:dates, a directory with train.json and dev.json, or a data set on the hub")
    prompt_template: str | None = _flag("data", None,
        r"makes the prompt of each row from its fields, e.g. '{instruction}\n{input}\nAnswer:'")
    src_length: int = _flag("data", 512, "most tokens of a prompt; the end of a longer one is dropped")
    tgt_length: int = _flag("data", 512, "most tokens of a target with its </s>, and of what is generated")
    dataloader_num_workers: int = _flag("data", 0, "accepted for PaddleNLP's sake; tokenising uses all cores anyway")
    task_name: str | None = _flag("data", None, "accepted for PaddleNLP's sake, which ignored it")

    do_train: bool | None = _flag("training", None, "train  [default: True, unless only --do_eval is asked for]")
    num_train_epochs: float = _flag("training", 3.0, "passes through the examples; a fraction ends within one")
    max_steps: int = _flag("training", -1, "steps of the run; above 0 it wins over num_train_epochs")
    per_device_train_batch_size: int = _flag("training", 8, "examples computed at once in training")
    max_tokens_per_batch: int | None = _flag("training", None,
        "instead of a number of examples: as many as fit into so many tokens; an example longer than that goes alone")
    packing: bool = _flag("training", True, "examples lie side by side without pads; always, as results are the same")
    gradient_accumulation_steps: int = _flag("training", 1,
        "batches that make up one step: the effect of so many times the batch size, for the memory of one")
    learning_rate: float = _flag("training", 5e-5, "the peak; try 1e-4 to 1e-3 with --lora, 1e-2 with --prefix")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = _flag("training", "linear",
        "course of the learning rate after the warm-up")
    warmup_ratio: float = _flag("training", 0.0, "part of the steps in which the learning rate rises from 0")
    warmup_steps: int = _flag("training", 0, "the same in steps; above 0 it wins over warmup_ratio")
    lr_decay_ratio: float = _flag("training", 0.1, "where linear and cosine end, as a part of the peak")
    weight_decay: float = _flag("training", 0.0, "pull of the weights towards 0, per step; biases and norms have none")
    label_smoothing: float = _flag("training", 0.0, "part of the probability spread over the whole vocabulary")
    max_grad_norm: float = _flag("training", 1.0, "gradients longer than this are shortened to it; 0: never")
    adam_beta1: float = _flag("training", 0.9, "AdamW: decay of the mean of the gradients")
    adam_beta2: float = _flag("training", 0.999, "AdamW: decay of the mean of their squares")
    adam_epsilon: float = _flag("training", 1e-8, "AdamW: added to the denominator")
    optim: Literal["adamw", "adamw_8bit"] = _flag("training", "adamw",
        "adamw_8bit keeps AdamW's two moments in 8 bits each, a quarter of their memory (needs bloomlm[optim8bit])")
    seed: int = _flag("training", 42, "start of the random numbers: order of the examples, adapter weights, dropout")

    device: Literal["auto", "gpu", "cuda", "cpu"] = _flag("precision and memory", "auto",
        "where to compute; auto is the GPU where there is one")
    fp16: bool = _flag("precision and memory", False, "compute in float16, with loss scaling")
    bf16: bool = _flag("precision and memory", False, "compute in bfloat16")
    fp16_opt_level: Literal["O1", "O2"] = _flag("precision and memory", "O1",
        "with fp16 or bf16: O1 keeps float32 weights, O2 halves them and learns on float32 copies")
    scale_loss: float = _flag("precision and memory", 32768.0, "with fp16: what the loss scale starts from")
    recompute: bool = _flag("precision and memory", False,
        "compute activations a second time instead of keeping them: about a third slower, far less memory")
    torch_compile: bool = _flag("precision and memory", False, "on a GPU: let torch.compile join small operations")

    lora: bool = _flag("adapters", False, "train a LoRA adapter instead of the whole model")
    r: int = _flag("adapters", 4, "LoRA: rank of the update; more learns more and takes more room")
    lora_alpha: float | None = _flag("adapters", None, "LoRA: the update counts lora_alpha / r times  [default: 2r]")
    lora_dropout: float = _flag("adapters", 0.0, "LoRA: probability that an input of the update is left out")
    target_modules: tuple[str, ...] = _flag("adapters", ("query_key_value",),
        "LoRA: layers that learn, some of query_key_value, dense, dense_h_to_4h, dense_4h_to_h")
    base_quantization: Literal["none", "int8"] = _flag("adapters", "none",
        "LoRA: int8 keeps the weights that do not learn rounded to 8 bits, in a quarter of float32's memory")
    merge_weights: bool = _flag("adapters", False,
        "LoRA: also write the model with the adapter added in, to output_dir/merged")
    prefix_tuning: bool = _flag("adapters", False, "train virtual tokens instead of the model", aliases=("prefix",))
    num_prefix_tokens: int = _flag("adapters", 10, "prefix: how many virtual tokens")
    prefix_projection: bool = _flag("adapters", False, "prefix: learn them through a small network")

    do_eval: bool | None = _flag("evaluation", None, "evaluate  [default: True if --eval_file is given]")
    evaluation_strategy: Literal["no", "steps", "epoch"] = _flag("evaluation", "no",
        "when to evaluate during training; with --do_eval no means steps")
    eval_steps: int | None = _flag("evaluation", None, "steps between evaluations  [default: logging_steps]")
    per_device_eval_batch_size: int = _flag("evaluation", 8, "examples computed at once in evaluation")
    do_generation: bool = _flag("evaluation", False,
        "also generate from the prompts alone: exact match, ROUGE, BLEU (needs bloomlm[metrics])")
    generate_num: int = _flag("evaluation", 0,
        "at the end, write so many generated answers beside the right ones to infer_result.json")
    min_tgt_length: int = _flag("evaluation", 0, "generation: tokens before </s> is allowed")
    num_beams: int | None = _flag("evaluation", None, "generation: above 1, beam search  [default: greedy]")
    length_penalty: float | None = _flag("evaluation", None,
        "beam search: score = log-probability / length ** this  [default: 1.0]")
    top_k: int | None = _flag("evaluation", None, "generation: above 1, draw from the k most likely tokens")
    top_p: float | None = _flag("evaluation", None,
        "generation: above 0, draw from the most likely tokens that add up to this probability")
    select_topk: bool = _flag("evaluation", True, "generation: False leaves top_k out and draws by top_p alone")
    no_repeat_ngram_size: int | None = _flag("evaluation", None,
        "generation: no run of this many tokens occurs twice  [default: 0, off]")

    output_dir: str = field(metadata={"section": "checkpoints", "help": "where everything the run makes is written"})
    overwrite_output_dir: bool = _flag("checkpoints", False, "start anew, removing what an earlier run left there")
    resume_from_checkpoint: str | None = _flag("checkpoints", None,
        "a checkpoint-N to go on from, PaddleNLP's too  [default: the newest in output_dir, if there is one]")
    prefix_layout: Literal["old", "new"] | None = _flag("checkpoints", None,
        "of a prefix in PaddleNLP's files: old to August 2023, new after it")
    trained_tensor_parallel_degree: int | None = _flag("checkpoints", None,
        "ranks that trained an adapter in PaddleNLP's files, where they do not tell")
    save_strategy: Literal["no", "steps", "epoch"] = _flag("checkpoints", "steps", "when to write checkpoint-N")
    save_steps: int = _flag("checkpoints", 500, "steps from one checkpoint to the next; the last step has one too")
    save_total_limit: int | None = _flag("checkpoints", None, "checkpoints to keep  [default: all]")
    load_best_model_at_end: bool = _flag("checkpoints", False, "end with the best checkpoint, not the last")
    metric_for_best_model: str | None = _flag("checkpoints", None,
        "what best means: eval_loss, eval_accuracy, eval_exact_match, ...  [default: eval_loss]")
    greater_is_better: bool | None = _flag("checkpoints", None, "direction of that metric  [default: as its name says]")
    max_shard_size: str = _flag("checkpoints", "5GB", "largest weight file; a larger model is written in several")

    tensor_parallel_degree: int = _flag("parallelism", -1,
        "processes that compute one copy of the model together, each a part of every layer  [default: 1]")
    pipeline_parallel_degree: int = _flag("parallelism", -1,
        "accepted for PaddleNLP's sake; 1 or -1: bloomlm does not spread blocks over processes")
    sharding_parallel_degree: int = _flag("parallelism", -1,
        "copies that share out what they hold among themselves  [default: all, with --sharding]")
    sharding: Literal["", "stage1", "stage2", "stage3"] = _flag("parallelism", "",
        "share out optimizer and gradients (stage2), and weights too (stage3)")

    logging_steps: int = _flag("reporting", 500, "steps from one line of metrics to the next")
    report_to: Literal["all", "tensorboard", "none"] = _flag("reporting", "all",
        "beside metrics.jsonl, which is always written; all: TensorBoard if it is installed")
    profile: bool = _flag("reporting", False,
        "write profile/ for steps 3 to 5: a Chrome trace and a table of the ten most costly operations")
    disable_tqdm: bool = _flag("reporting", False, "no progress bar, plain lines instead")
    # fmt: on


_DEFAULTS = {item.name: item.default for item in fields(TrainingConfig)}


def default_of(name: str) -> object:
    """What a flag is where it is not given."""
    return _DEFAULTS[name]


def note_unused(config: TrainingConfig, notices: list[str], names: tuple[str, ...], acts: bool, needed: str) -> None:
    """Note the flags that are given and do nothing.

    Args:
        config: as given.
        notices: gets a line.
        names: of flags that belong together.
        acts: whether they do something.
        needed: the flag without which they do not.
    """
    given = [f"--{name}" for name in names if getattr(config, name) != default_of(name)]
    if given and not acts:
        notices.append(f"{', '.join(given)}: not used without {needed}")
