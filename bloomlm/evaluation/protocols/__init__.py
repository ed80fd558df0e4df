"""The protocols, one file each. A new one is a file here and a row of this table."""

from bloomlm.evaluation.protocol import Protocol
from bloomlm.evaluation.protocols import generation, gptq, lm_eval, lm_eval_tasks, reference

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        reference.PROTOCOL,
        lm_eval.PROTOCOL,
        gptq.PROTOCOL,
        generation.PROTOCOL,
        lm_eval_tasks.PROTOCOL,
    )
}
"""Name -> protocol."""
