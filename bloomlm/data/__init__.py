"""From text to packed batches: tokenizer, rows of files, tokenised examples, loader."""
