"""How a model, its gradients and its examples are divided among ranks, and what the ranks exchange.

A command or an evaluation on many ranks is started by --num_processes or torchrun and looks like this:

    from bloomlm.parallel.launch import joined_ranks, world_size
    from bloomlm.parallel.mesh import degrees_from_flags

    degrees = degrees_from_flags(world_size(), tensor_parallel_degree=2)   # raises ConfigError if impossible
    with joined_ranks(degrees, "cpu") as mesh:                             # mesh is ALONE without a launcher
        model = load_model(path, mesh=mesh)                                # each rank reads its own parts
        ...

Inside the block every rank runs the same program with the same values. Three rules keep it correct:

- All ranks call the model (`model.transformer(...)`, `generate`, `score_tokens`) equally often and in the same order.
  The ranks of one tp group (mesh.tp_rank) pass the same inputs and get the same results, bit for bit.
- The head's weight holds this rank's part of the vocabulary. With `head_of(model)`, linear_cross_entropy and
  score_tokens give results over the whole vocabulary; `model.logits` gathers all logits.
- Data-parallel ranks (mesh.dp_rank of mesh.degrees.dp) take different examples: BatchLoader(..., dp_degree=, dp_rank=)
  distributes them, and mesh.sum_over(tensor, ("dp_replicate", "dp_shard")) adds results up. Only mesh.is_main prints
  and writes files; checkpoint/main_rank.py helps with files that all ranks write.

A model is divided in this order, as checkpoint/reader.py does it:

    1. create it on the meta device
    2. cut_model       tensor parallelism: each parameter takes the shape of this rank's part
    3. apply_adapter   on the divided model; the adapter's fresh weights are whole and the same on every rank
    4. cut_adapter     tensor parallelism for the adapter
    5. shard_model     FSDP for everything
    6. read weights    only this rank's slices

mesh.py          the ranks along three axes            layout.py          THE table; whole tensors from parts
launch.py        joining and leaving together          tensor_parallel.py a part of every layer on each rank
collectives.py   exchanges and their gradients         data_parallel.py   FSDP, replicated copies, the global norm
plan.py          the memory that a rank will use       traffic.py         what a rank will send, and how long that takes
vocabulary_loss.py and vocabulary_scores.py: the head with its cross entropy, where ranks share the vocabulary
"""
