# make demo and make test need Python 3.11, git and make; each installs what it needs into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench clean

demo: $(VENV)/.installed-demo
	$(BIN)/bloomlm demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/train_step.py --tuning full
	$(BIN)/python benchmarks/train_step.py --tuning lora
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/load.py

# The lock pins every version that the tests were run with; the package itself allows ranges.
$(VENV)/.installed-demo: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[plots,metrics]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[dev]'
	touch $@ $(VENV)/.installed-demo

clean:
	rm -rf $(VENV) demo build dist *.egg-info
