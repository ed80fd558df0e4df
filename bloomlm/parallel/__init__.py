"""How tensors lie on ranks, and what ranks exchange.

For whoever runs a model on many ranks (a command, an evaluation), started by --num_processes or torchrun:

    from bloomlm.parallel.launch import joined_ranks, world_size
    from bloomlm.parallel.mesh import degrees_from_flags

    degrees = degrees_from_flags(world_size(), tensor_parallel_degree=2)   # refuses what cannot work
    with joined_ranks(degrees, "cpu") as mesh:                             # ALONE without a launcher
        model = load_model(path, mesh=mesh)                                # each rank reads its parts
        ...

Inside, every rank runs the same program with the same values; three rules make it right:

- All ranks make the same calls of the model in the same order: `model.transformer(...)`, `generate`, `score_tokens`.
  Ranks of one tp group (mesh.tp_rank) get the same inputs and the same results, bit for bit.
- The head's weight is this rank's part of the vocabulary. Pass `ranks=tensor_parallel_group(model)` to
  linear_cross_entropy and score_tokens, and whole results come back. `model.logits` gathers whole logits.
- Data-parallel ranks (mesh.dp_rank of mesh.degrees.dp) take different examples: BatchLoader(..., dp_degree=, dp_rank=)
  deals them out; add results up with mesh.sum_over(tensor, ("dp_replicate", "dp_shard")). With FSDP they must make
  equally many calls. Only mesh.is_main writes and talks; files that all write: checkpoint/main_rank.py.

model.open_rows(...) has room for this rank's heads.

mesh.py          the ranks along three axes      layout.py            which part of a parameter a rank has
launch.py        join and leave together         tensor_parallel.py   a part of every layer on each rank
parallelize.py   the order of it all             data_parallel.py     FSDP, replicated copies, the global norm
gather.py        whole tensors out of parts      collectives.py       exchanges and their gradients
plan.py          what a rank will hold           traffic.py           what it will send, and how long that takes
vocabulary_loss.py and vocabulary_scores.py: the head with its cross entropy, where ranks share the vocabulary
"""
