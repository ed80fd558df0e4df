"""Tokens after a prompt: options, pure functions on logits, beam bookkeeping, the loop, and texts around it.

decode.py alone knows BLOOM; the others know no model, and exported programs are decoded by them too.
"""
