"""A tokenizer's vocabulary cut to a corpus, or extended by one, and the model's rows with it."""
