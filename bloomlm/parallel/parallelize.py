"""The order in which a model is divided among ranks.

    1. create it on the meta device
    2. cut_model       tensor parallelism: shapes become those of this rank's parts; refuses impossible degrees
    3. apply_adapter   on the cut model (device=where its fresh weights go), whole and the same on every rank
    4. divide_adapter  cut the adapter, then divide everything by FSDP
    5. read weights    only this rank's slices (checkpoint/reader.py)

Recompute may be switched on at any point: FSDP gathers a block again when it is recomputed.
"""

from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.parallel.data_parallel import shard_model
from bloomlm.parallel.mesh import Mesh
from bloomlm.parallel.tensor_parallel import apply_tensor_parallel, cut_adapter


def cut_model(model: BloomForCausalLM, mesh: Mesh) -> None:
    """Step 2: leave this rank its part of the base model's layers.

    Raises:
        ConfigError: the model cannot be divided among so many ranks.
    """
    apply_tensor_parallel(model, mesh)


def divide_adapter(model: BloomForCausalLM, mesh: Mesh, *, reshard_after_forward: bool = True) -> None:
    """Step 4: cut the adapter, if there is one, and leave this rank its shards.

    Args:
        model: after step 3.
        mesh: the ranks.
        reshard_after_forward: as in shard_model.
    """
    cut_adapter(model, mesh)
    shard_model(model, mesh, reshard_after_forward=reshard_after_forward)
