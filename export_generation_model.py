"""PaddleNLP's name for `bloomlm export`."""

from bloomlm.cli.main import run_verb

if __name__ == "__main__":
    run_verb("export")
