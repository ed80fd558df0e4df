"""bloomlm: one toolkit for the BLOOM and BLOOMZ language models."""
