"""Checks of the flags of preference tuning."""

from bloomlm.errors import ConfigError
from bloomlm.training.checks import note_unused
from bloomlm.training.config import TrainingConfig

_KTO_FLAGS = ("desirable_weight", "undesirable_weight")


def check_preference(config: TrainingConfig, notices: list[str]) -> None:
    """Refuse combinations that no objective knows, and note flags that do nothing."""
    note_unused(config, notices, ("preference_beta",), config.preference is not None, "--preference")
    note_unused(config, notices, _KTO_FLAGS, config.preference == "kto", "--preference kto")
    if config.preference in ("orpo", "kto") and config.label_smoothing:
        raise ConfigError(
            f"--label_smoothing {config.label_smoothing:g} with --preference {config.preference}: this loss has none; "
            "leave it out, or choose dpo"
        )
    if config.preference == "dpo" and config.label_smoothing >= 0.5:
        raise ConfigError(
            f"--label_smoothing {config.label_smoothing:g} with --preference dpo is the probability that a pair is the "
            "wrong way round; expected below 0.5, or nothing could be learned"
        )
    if config.preference == "kto" and config.do_generation:
        raise ConfigError(
            "--do_generation compares generated answers with the targets, and with --preference kto some targets are "
            "undesirable answers; leave it out"
        )
