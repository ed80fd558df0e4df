"""lm-eval's own command with the model `bloomlm`, for releases that do not read entry points.

python -m bloomlm.evaluation.lm_eval_main --model bloomlm --model_args pretrained=builtin:tiny --tasks TASK
"""

from lm_eval.__main__ import cli_evaluate

from bloomlm.evaluation import lm_eval_adapter

if __name__ == "__main__":
    assert lm_eval_adapter.BloomLM is not None  # importing it registers it
    cli_evaluate()
