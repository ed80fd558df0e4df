"""What `import bloomlm` offers, and what it costs."""

import subprocess
import sys
import tomllib
from pathlib import Path

import bloomlm
from bloomlm import errors

PUBLIC_NAMES = [
    "AdapterError",
    "BackendMissingError",
    "BeamSearch",
    "BloomConfig",
    "BloomForCausalLM",
    "BloomlmError",
    "CheckpointError",
    "ClosingError",
    "Completion",
    "ConfigError",
    "DataError",
    "EvaluationReport",
    "GenerationConfig",
    "GenerationError",
    "Greedy",
    "LoadedModel",
    "LoraConfig",
    "PrefixConfig",
    "ProgramError",
    "QueueFullError",
    "Sampling",
    "ServingError",
    "Tokenizer",
    "TrainingConfig",
    "TrainingError",
    "__version__",
    "evaluate",
    "finetune",
    "generate",
    "load",
]


def test_public_names() -> None:
    assert bloomlm.__all__ == PUBLIC_NAMES
    assert set(PUBLIC_NAMES) <= set(dir(bloomlm))
    for name in PUBLIC_NAMES:
        value = getattr(bloomlm, name)
        assert name == "__version__" or (value.__name__ == name and value.__doc__)


def test_every_error_is_public() -> None:
    raised = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert raised <= set(PUBLIC_NAMES)


def test_unknown_names_are_attribute_errors() -> None:
    assert not hasattr(bloomlm, "no_such_name")


def test_version_is_that_of_the_project() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert bloomlm.__version__ == tomllib.loads(project.read_text())["project"]["version"]


def test_import_is_light_and_quick() -> None:
    code = (
        "import sys, time; started = time.process_time(); import bloomlm; seconds = time.process_time() - started; "
        "heavy = sorted({'torch', 'numpy', 'tokenizers', 'rich', 'click'} & set(sys.modules)); "
        "assert not heavy, heavy; assert seconds < 0.3, seconds"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
