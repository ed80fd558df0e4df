"""The flags of `bloomlm finetune`, under the names that PaddleNLP's finetune_generation.py gave them.

Plain values: what they do together is decided in checks.py, which fills in what depends on other flags.
"""

from dataclasses import dataclass, fields
from typing import Literal

from bloomlm.flags import REQUIRED, Flags, ModelFlags, PrefixLayoutName, flag, same_flag


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Flags):
    """Everything a fine-tuning run can be told; each field is a flag and a key of --config."""

    # fmt: off
    model_name_or_path: str = flag("model", "bigscience/bloom-560m",
        "what to start from: builtin:tiny, a directory, or a hub name")
    paddle_tokenization: bool = same_flag(ModelFlags, "paddle_tokenization")

    train_file: str | None = flag("data", None,
        "examples to learn: .jsonl, .json or .csv with src/tgt, instruction/output, prompt/completion, ... in each row")
    eval_file: str | None = flag("data", None, "examples to evaluate on, in the same formats")
    dataset_name_or_path: str | None = flag("data", None,
        "both at once: builtin:dates, a directory with train.json and dev.json, or a data set on the hub")
    prompt_template: str | None = flag("data", None,
        r"makes the prompt of each row from its fields, e.g. '{instruction}\n{input}\nAnswer:'")
    src_length: int = flag("data", 512, "most tokens of a prompt; the end of a longer one is dropped")
    tgt_length: int = flag("data", 512, "most tokens of a target with its </s>, and of what is generated")
    dataloader_num_workers: int = flag("data", 0, "accepted for PaddleNLP's sake; tokenising uses all cores anyway")
    task_name: str | None = flag("data", None, "accepted for PaddleNLP's sake, which ignored it")

    do_train: bool | None = flag("training", None, "train  [default: True, unless only --do_eval is asked for]")
    num_train_epochs: float = flag("training", 3.0, "passes through the examples; a fraction ends within one")
    max_steps: int = flag("training", -1, "steps of the run; above 0 it wins over num_train_epochs")
    per_device_train_batch_size: int = flag("training", 8, "examples computed at once in training")
    max_tokens_per_batch: int | None = flag("training", None,
        "instead of a number of examples: as many as fit into so many tokens; an example longer than that goes alone")
    packing: bool = flag("training", True, "examples lie side by side without pads; always, as results are the same")
    gradient_accumulation_steps: int = flag("training", 1,
        "batches that make up one step: the effect of so many times the batch size, for the memory of one")
    learning_rate: float = flag("training", 5e-5, "the peak; try 1e-4 to 1e-3 with --lora, 1e-2 with --prefix")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = flag("training", "linear",
        "course of the learning rate after the warm-up")
    warmup_ratio: float = flag("training", 0.0, "part of the steps in which the learning rate rises from 0")
    warmup_steps: int = flag("training", 0, "the same in steps; above 0 it wins over warmup_ratio")
    lr_decay_ratio: float = flag("training", 0.1, "where linear and cosine end, as a part of the peak")
    weight_decay: float = flag("training", 0.0, "pull of the weights towards 0, per step; biases and norms have none")
    label_smoothing: float = flag("training", 0.0, "part of the probability spread over the whole vocabulary")
    max_grad_norm: float = flag("training", 1.0, "gradients longer than this are shortened to it; 0: never")
    adam_beta1: float = flag("training", 0.9, "AdamW: decay of the mean of the gradients")
    adam_beta2: float = flag("training", 0.999, "AdamW: decay of the mean of their squares")
    adam_epsilon: float = flag("training", 1e-8, "AdamW: added to the denominator")
    optim: Literal["adamw", "adamw_8bit"] = flag("training", "adamw",
        "adamw_8bit keeps AdamW's two moments in 8 bits each, a quarter of their memory (needs bloomlm[optim8bit])")
    seed: int = flag("training", 42, "start of the random numbers: order of the examples, adapter weights, dropout")

    device: Literal["auto", "gpu", "cuda", "cpu"] = flag("precision and memory", "auto",
        "where to compute; auto is the GPU where there is one")
    fp16: bool = flag("precision and memory", False, "compute in float16, with loss scaling")
    bf16: bool = flag("precision and memory", False, "compute in bfloat16")
    fp16_opt_level: Literal["O1", "O2"] = flag("precision and memory", "O1",
        "with fp16 or bf16: O1 keeps float32 weights, O2 halves them and learns on float32 copies")
    scale_loss: float = flag("precision and memory", 32768.0, "with fp16: what the loss scale starts from")
    recompute: bool = flag("precision and memory", False,
        "compute activations a second time instead of keeping them: about a third slower, far less memory")
    torch_compile: bool = flag("precision and memory", False, "on a GPU: let torch.compile join small operations")

    lora: bool = flag("adapters", False, "train a LoRA adapter instead of the whole model")
    r: int = flag("adapters", 4, "LoRA: rank of the update; more learns more and takes more room")
    lora_alpha: float | None = flag("adapters", None, "LoRA: the update counts lora_alpha / r times  [default: 2r]")
    lora_dropout: float = flag("adapters", 0.0, "LoRA: probability that an input of the update is left out")
    target_modules: tuple[str, ...] = flag("adapters", ("query_key_value",),
        "LoRA: layers that learn, some of query_key_value, dense, dense_h_to_4h, dense_4h_to_h")
    base_quantization: Literal["none", "int8"] = flag("adapters", "none",
        "LoRA: int8 keeps the weights that do not learn rounded to 8 bits, in a quarter of float32's memory")
    merge_weights: bool = flag("adapters", False,
        "LoRA: also write the model with the adapter added in, to output_dir/merged")
    prefix_tuning: bool = flag("adapters", False, "train virtual tokens instead of the model", aliases=("prefix",))
    num_prefix_tokens: int = flag("adapters", 10, "prefix: how many virtual tokens")
    prefix_projection: bool = flag("adapters", False, "prefix: learn them through a small network")

    do_eval: bool | None = flag("evaluation", None, "evaluate  [default: True if --eval_file is given]")
    evaluation_strategy: Literal["no", "steps", "epoch"] = flag("evaluation", "no",
        "when to evaluate during training; with --do_eval no means steps")
    eval_steps: int | None = flag("evaluation", None, "steps between evaluations  [default: logging_steps]")
    per_device_eval_batch_size: int = flag("evaluation", 8, "examples computed at once in evaluation")
    do_generation: bool = flag("evaluation", False,
        "also generate from the prompts alone: exact match, ROUGE, BLEU (needs bloomlm[metrics])")
    generate_num: int = flag("evaluation", 0,
        "at the end, write so many generated answers beside the right ones to infer_result.json")
    min_tgt_length: int = flag("evaluation", 0, "generation: tokens before </s> is allowed")
    num_beams: int | None = flag("evaluation", None, "generation: above 1, beam search  [default: greedy]")
    length_penalty: float | None = flag("evaluation", None,
        "beam search: score = log-probability / length ** this  [default: 1.0]")
    top_k: int | None = flag("evaluation", None, "generation: above 1, draw from the k most likely tokens")
    top_p: float | None = flag("evaluation", None,
        "generation: above 0, draw from the most likely tokens that add up to this probability")
    select_topk: bool = flag("evaluation", True, "generation: False leaves top_k out and draws by top_p alone")
    no_repeat_ngram_size: int | None = flag("evaluation", None,
        "generation: no run of this many tokens occurs twice  [default: 0, off]")

    output_dir: str = flag("checkpoints", REQUIRED, "where everything the run makes is written")
    overwrite_output_dir: bool = flag("checkpoints", False, "start anew, removing what an earlier run left there")
    resume_from_checkpoint: str | None = flag("checkpoints", None,
        "a checkpoint-N to go on from, PaddleNLP's too  [default: the newest in output_dir, if there is one]")
    prefix_layout: PrefixLayoutName | None = same_flag(ModelFlags, "prefix_layout", section="checkpoints")
    trained_tensor_parallel_degree: int | None = same_flag(ModelFlags, "trained_tensor_parallel_degree",
        section="checkpoints")
    save_strategy: Literal["no", "steps", "epoch"] = flag("checkpoints", "steps", "when to write checkpoint-N")
    save_steps: int = flag("checkpoints", 500, "steps from one checkpoint to the next; the last step has one too")
    save_total_limit: int | None = flag("checkpoints", None, "checkpoints to keep  [default: all]")
    load_best_model_at_end: bool = flag("checkpoints", False, "end with the best checkpoint, not the last")
    metric_for_best_model: str | None = flag("checkpoints", None,
        "what best means: eval_loss, eval_accuracy, eval_exact_match, ...  [default: eval_loss]")
    greater_is_better: bool | None = flag("checkpoints", None, "direction of that metric  [default: as its name says]")
    max_shard_size: str = flag("checkpoints", "5GB", "largest weight file; a larger model is written in several")

    tensor_parallel_degree: int = flag("parallelism", -1,
        "processes that compute one copy of the model together, each a part of every layer  [default: 1]")
    pipeline_parallel_degree: int = flag("parallelism", -1,
        "accepted for PaddleNLP's sake; 1 or -1: bloomlm does not spread blocks over processes")
    sharding_parallel_degree: int = flag("parallelism", -1,
        "copies that share out what they hold among themselves  [default: all, with --sharding]")
    sharding: Literal["", "stage1", "stage2", "stage3"] = flag("parallelism", "",
        "share out optimizer and gradients (stage2), and weights too (stage3)")

    logging_steps: int = flag("reporting", 500, "steps from one line of metrics to the next")
    report_to: Literal["all", "tensorboard", "none"] = flag("reporting", "all",
        "beside metrics.jsonl, which is always written; all: TensorBoard if it is installed")
    profile: bool = flag("reporting", False,
        "write profile/ for steps 3 to 5: a Chrome trace and a table of the ten most costly operations")
    disable_tqdm: bool = flag("reporting", False, "no progress bar, plain lines instead")
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
