"""Files that PaddleNLP wrote or reads: models, adapters, training state; no Paddle is needed."""
