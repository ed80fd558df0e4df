"""Tokens after a prompt: options, pure functions on logits, beam bookkeeping, the session, and the texts around it.

Nothing here knows a model. BLOOM in PyTorch (model/decoding.py) and exported programs (bloomlm.runtime) offer the calls
of language_model.py, so options mean the same for both.
"""
