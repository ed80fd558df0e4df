"""Tokens after a prompt: options, pure functions on logits, beam bookkeeping, and the loop over decode_step.

decode.py joins the others to BLOOM; they know no model.
"""
