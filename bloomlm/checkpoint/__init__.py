"""Files to weights and back: models and adapters in several programs' formats, and the state of training runs."""
