"""From text to packed batches: the tokenizer, rows of files, tokenised examples, the loader."""
