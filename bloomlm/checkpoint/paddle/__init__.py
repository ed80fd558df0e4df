"""PaddleNLP's files, read and written without Paddle: models, adapters and training runs. importer.py is the door."""
