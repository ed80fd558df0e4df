"""PaddleNLP's name for `bloomlm infer`."""

from bloomlm.cli.main import run_verb

if __name__ == "__main__":
    run_verb("infer")
