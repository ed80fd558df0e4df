"""Runs exported programs: no model code, no checkpoint code, no transformers."""

from bloomlm.runtime.program import Program

__all__ = ["Program"]
