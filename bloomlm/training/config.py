"""The flags of `bloomlm finetune`, under the names that PaddleNLP's finetune_generation.py gave them.

Each field declares its range. resolve.py checks the flags together and turns them into the values of run_plan.py, with
which all later code works.
"""

from dataclasses import dataclass, fields
from typing import Literal

from bloomlm.flags import REQUIRED, Flags, ModelFlags, PrefixLayoutName, flag, same_flag


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Flags):
    """All options of a fine-tuning run; each field is a flag and a key of --config."""

    # fmt: off
    model_name_or_path: str = flag("model", "bigscience/bloom-560m",
        "model to start from: builtin:tiny, a directory, or a hub name")
    paddle_tokenization: bool = same_flag(ModelFlags, "paddle_tokenization")

    train_file: str | None = flag("data", None,
        "training data: rows of pairs, texts, conversations or preferences (.jsonl, .json, .csv, .parquet), .txt, or a "
        "directory")
    eval_file: str | None = flag("data", None, "evaluation data, in the same formats; for --mixture also such a file")
    dataset_name_or_path: str | None = flag("data", None,
        "a data set with both: builtin:dates, a directory with train.json and dev.json, or a name on the hub")
    prompt_template: str | None = flag("data", None,
        r"builds the prompt of each row from its fields, e.g. '{instruction}\n{input}\nAnswer:'")
    src_length: int = flag("data", 512, "maximum tokens of a prompt; a longer one loses its end", minimum=1)
    tgt_length: int = flag("data", 512,
        "maximum tokens of a target including </s>, and of a generated answer", minimum=2)
    dataloader_num_workers: int = flag("data", 0,
        "accepted for compatibility with PaddleNLP; tokenising uses all cores anyway", minimum=0)
    task_name: str | None = flag("data", None, "accepted for compatibility with PaddleNLP, which ignored it")
    mixture: str | None = flag("data", None,
        "raw text from several sources: a YAML list with name, path, weight and, if wanted, language of each")
    max_length: int = flag("data", 1024,
        "raw text: most tokens of a window; conversations: most tokens of one, which then loses its last turns",
        minimum=2)
    chat_template: str | None = flag("data", None,
        "conversations: a file with a Jinja template, or plain; saved with the model  [default: the model's own]")
    learn_last_turn: bool = flag("data", False, "conversations: learn the last answer only instead of all")

    do_train: bool | None = flag("training", None, "train  [default: True, unless only --do_eval is given]")
    num_train_epochs: float = flag("training", 3.0, "passes through the examples; may be a fraction")
    max_steps: int = flag("training", -1, "steps of the run; above 0 it overrides num_train_epochs")
    per_device_train_batch_size: int = flag("training", 8, "examples of a training batch", minimum=1)
    max_tokens_per_batch: int | None = flag("training", None,
        "size of a batch in tokens instead of examples; a longer example forms a batch alone", minimum=1)
    packing: bool = flag("training", True,
        "put examples one after another without padding; always on, because results are the same")
    gradient_accumulation_steps: int = flag("training", 1,
        "batches of one step: the effect of a batch this many times as large, with the memory of one", minimum=1)
    learning_rate: float = flag("training", 5e-5,
        "peak of the learning rate; try 1e-4 to 1e-3 with --lora, 1e-2 with --prefix", minimum=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = flag("training", "linear",
        "how the learning rate changes after the warm-up")
    warmup_ratio: float = flag("training", 0.0,
        "fraction of the steps during which the learning rate rises from 0", minimum=0, maximum=1)
    warmup_steps: int = flag("training", 0,
        "number of steps during which it rises; above 0 it overrides warmup_ratio", minimum=0)
    lr_decay_ratio: float = flag("training", 0.1,
        "final learning rate of linear and cosine, as a fraction of the peak", minimum=0, maximum=1)
    weight_decay: float = flag("training", 0.0,
        "AdamW's decay of the weights; biases and layer norms are not decayed", minimum=0)
    label_smoothing: float = flag("training", 0.0,
        "probability that is spread over the vocabulary in the targets; dpo: that a pair is the wrong way round",
        minimum=0, below=1)
    max_grad_norm: float = flag("training", 1.0,
        "largest norm of the gradients, to which larger ones are scaled down; 0 turns this off", minimum=0)
    adam_beta1: float = flag("training", 0.9, "AdamW: decay of the mean gradient", minimum=0, below=1)
    adam_beta2: float = flag("training", 0.999,
        "AdamW: decay of the mean squared gradient", minimum=0, below=1)
    adam_epsilon: float = flag("training", 1e-8, "AdamW: added to the denominator", above=0)
    optim: Literal["adamw", "adamw_8bit"] = flag("training", "adamw",
        "adamw_8bit keeps AdamW's two moments in 8 bits each, a quarter of their memory (needs bloomlm[optim8bit])")
    seed: int = flag("training", 42,
        "seed of all random numbers: order of the examples, adapter weights, dropout", minimum=0)
    loraplus_lr_ratio: float = flag("training", 1.0,
        "LoRA+: learning rate of LoRA's matrix B divided by that of A; 16 is usual", above=0)
    neftune_noise_alpha: float = flag("training", 0.0,
        "NEFTune: size of the noise on the embeddings of training, usually 5 to 15; 0 turns it off", minimum=0)
    find_learning_rate: bool = flag("training", False,
        "do not train: try rising learning rates for 100 steps, suggest one, and draw learning_rate.png")
    early_stopping_patience: int | None = flag("training", None,
        "end after so many evaluations in a row that did not improve metric_for_best_model  [default: never]",
        minimum=1)
    early_stopping_threshold: float = flag("training", 0.0,
        "the least change of that metric that counts as an improvement", minimum=0)

    device: Literal["auto", "gpu", "cuda", "cpu"] = flag("precision and memory", "auto",
        "where to compute; auto chooses the GPU if there is one")
    fp16: bool = flag("precision and memory", False, "compute in float16, with loss scaling")
    bf16: bool = flag("precision and memory", False, "compute in bfloat16")
    fp16_opt_level: Literal["O1", "O2"] = flag("precision and memory", "O1",
        "with fp16 or bf16: O1 keeps float32 weights, O2 has 16-bit weights and updates float32 copies")
    scale_loss: float = flag("precision and memory", 32768.0, "with fp16: initial loss scale")
    recompute: bool = flag("precision and memory", False,
        "compute activations again in the backward pass instead of keeping them: a third slower, much less memory")
    torch_compile: bool = flag("precision and memory", False, "on a GPU: fuse small operations with torch.compile")

    lora: bool = flag("adapters", False, "train a LoRA adapter instead of the whole model")
    r: int = flag("adapters", 4,
        "LoRA: rank of the update; a higher rank learns more and takes more memory", aliases=("lora_rank",))
    lora_alpha: float | None = flag("adapters", None,
        "LoRA: the update is scaled by lora_alpha / r  [default: 2r]")
    lora_dropout: float = flag("adapters", 0.0, "LoRA: dropout on the input of the update", minimum=0, below=1)
    target_modules: tuple[str, ...] = flag("adapters", ("query_key_value",),
        "LoRA: layers that learn, any of query_key_value, dense, dense_h_to_4h, dense_4h_to_h")
    use_rslora: bool = flag("adapters", False, "LoRA: scale the update by lora_alpha / sqrt(r) instead (rsLoRA)")
    use_dora: bool = flag("adapters", False, "LoRA: also train the norm of each row of the updated weights (DoRA)")
    train_new_tokens: bool = flag("adapters", False,
        "LoRA: also train the rows of the embedding that `bloomlm extend` added")
    base_quantization: Literal["none", "int8", "nf4"] = flag("adapters", "none",
        "LoRA: round the frozen weights to 8 bits, or those of the blocks to 4 (QLoRA; needs bloomlm[nf4])")
    merge_weights: bool = flag("adapters", False,
        "LoRA: also write the model with the adapter merged in, to output_dir/merged")
    prefix_tuning: bool = flag("adapters", False, "train virtual tokens instead of the model", aliases=("prefix",))
    num_prefix_tokens: int = flag("adapters", 10, "prefix: number of virtual tokens")
    prefix_projection: bool = flag("adapters", False, "prefix: learn the virtual tokens through a small network")

    preference: Literal["dpo", "orpo", "kto"] | None = flag("preference", None,
        "learn from better and worse answers: prompt/chosen/rejected in each row, for kto also prompt/completion/label")
    preference_beta: float = flag("preference", 0.1,
        "dpo, kto: how strongly the model is held to the one it starts from; orpo: weight of the odds ratio", above=0)
    desirable_weight: float = flag("preference", 1.0, "kto: factor of the losses of desirable answers", minimum=0)
    undesirable_weight: float = flag("preference", 1.0,
        "kto: factor of the losses of undesirable answers", minimum=0)

    do_eval: bool | None = flag("evaluation", None, "evaluate  [default: True if --eval_file is given]")
    evaluation_strategy: Literal["no", "steps", "epoch"] = flag("evaluation", "no",
        "when to evaluate during training; with --do_eval, `no` means steps")
    eval_steps: int | None = flag("evaluation", None,
        "steps between evaluations  [default: logging_steps]", minimum=1)
    per_device_eval_batch_size: int = flag("evaluation", 8, "examples of an evaluation batch", minimum=1)
    do_generation: bool = flag("evaluation", False,
        "also generate answers and score them: exact match, ROUGE, BLEU (needs bloomlm[metrics])")
    generate_num: int = flag("evaluation", 0,
        "at the end, write this many generated answers with their references to infer_result.json", minimum=0)
    min_tgt_length: int = flag("evaluation", 0, "generation: minimum tokens before </s>", minimum=0)
    num_beams: int | None = flag("evaluation", None,
        "generation: above 1, beam search  [default: greedy]", minimum=1)
    length_penalty: float | None = flag("evaluation", None,
        "beam search: score = log-probability / length ** this  [default: 1.0]")
    top_k: int | None = flag("evaluation", None,
        "generation: above 1, sample from the k most likely tokens", minimum=0)
    top_p: float | None = flag("evaluation", None,
        "generation: above 0, sample from the most likely tokens of this total probability", minimum=0, maximum=1)
    select_topk: bool = flag("evaluation", True, "generation: False ignores top_k and samples by top_p alone")
    no_repeat_ngram_size: int | None = flag("evaluation", None,
        "generation: no sequence of this many tokens may occur twice  [default: 0, off]", minimum=0)

    output_dir: str = flag("checkpoints", REQUIRED, "directory for everything the run writes")
    overwrite_output_dir: bool = flag("checkpoints", False,
        "remove what an earlier run left in output_dir, and start from the beginning")
    resume_from_checkpoint: str | None = flag("checkpoints", None,
        "checkpoint-N to resume from, PaddleNLP's too  [default: the newest in output_dir, if there is one]")
    prefix_layout: PrefixLayoutName | None = same_flag(ModelFlags, "prefix_layout", section="checkpoints")
    trained_tensor_parallel_degree: int | None = same_flag(ModelFlags, "trained_tensor_parallel_degree",
        section="checkpoints")
    save_strategy: Literal["no", "steps", "epoch"] = flag("checkpoints", "steps", "when to write checkpoint-N")
    save_steps: int = flag("checkpoints", 500,
        "steps between checkpoints; the last step is always saved", minimum=1)
    save_total_limit: int | None = flag("checkpoints", None, "checkpoints to keep  [default: all]", minimum=1)
    load_best_model_at_end: bool = flag("checkpoints", False, "the result is the best checkpoint and not the last")
    metric_for_best_model: str | None = flag("checkpoints", None,
        "metric of the best checkpoint: eval_loss, eval_accuracy, eval_exact_match, eval_bits_per_byte, ...  "
        "[default: eval_loss]")
    greater_is_better: bool | None = flag("checkpoints", None,
        "whether a greater metric is better  [default: depends on the metric]")
    max_shard_size: str = flag("checkpoints", "5GB", "largest weight file; a larger model is split into several")

    tensor_parallel_degree: int = flag("parallelism", -1,
        "processes that compute one copy of the model together, each a part of every layer  [default: 1]")
    pipeline_parallel_degree: int = flag("parallelism", -1,
        "accepted for compatibility with PaddleNLP; 1 or -1, because bloomlm has no pipeline parallelism")
    sharding_parallel_degree: int = flag("parallelism", -1,
        "copies of the model that divide their state among themselves  [default: all, with --sharding]")
    sharding: Literal["", "stage1", "stage2", "stage3"] = flag("parallelism", "",
        "divide optimizer state and gradients among the copies (stage2), and weights too (stage3)")

    logging_steps: int = flag("reporting", 500, "steps between two lines of metrics", minimum=1)
    report_to: str = flag("reporting", "all",
        "where metrics go too: any of tensorboard,wandb,mlflow,trackio; all is TensorBoard if installed; or none")
    profile: bool = flag("reporting", False,
        "profile steps 3 to 5 into profile/: a Chrome trace and a table of the ten most costly operations")
    disable_tqdm: bool = flag("reporting", False, "print plain lines instead of a progress bar")
    # fmt: on


_DEFAULTS = {item.name: item.default for item in fields(TrainingConfig)}


def default_of(name: str) -> object:
    """The default value of a flag."""
    return _DEFAULTS[name]
