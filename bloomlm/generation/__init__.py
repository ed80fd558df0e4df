"""Continuing prompts: options, pure functions on logits, beam search, the session, and completion of texts.

Nothing here knows a model. BLOOM in PyTorch (model/decoding.py) and exported programs (bloomlm.runtime) both have the
interface in language_model.py, so options mean the same for both.
"""
