# make demo and make test need Python 3.11, git and make; each installs what it needs into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# What make run_eval evaluates: make run_eval MODEL=bigscience/bloom-560m EVAL_PATH=wiki.valid.tokens
MODEL ?= builtin:tiny
EVAL_PATH ?= wikitext-2
EVAL_FLAGS ?=
TENSOR_PARALLEL_DEGREE ?= 2

.PHONY: demo test fuzz kill check docs bench-report run_eval run_eval_tps clean

demo: $(VENV)/.installed-demo
	$(BIN)/bloomlm demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Damages files of every kind for ten minutes, and prints what became of them.
fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m tests.fuzz --minutes 10 --at_least 20000

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/architecture

# The site, in site/; dead links and names that do not exist are errors.
docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

# Kills every command at random moments and at every change of a file, and lets its disk run full. unshare lets an ordinary
# user mount small disks that nobody else sees; KILL_FLAGS="--only convert --moments 500" chooses.
KILL_FLAGS ?=
kill: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 unshare --map-root-user --mount $(BIN)/python -m tests.kills $(KILL_FLAGS)

# Runs every benchmark and redraws the tables of docs/benchmarks.md: some hours, and 25 GB of disk. It goes on where it stopped.
# ONLY=train_step chooses those whose names begin so; FORCE=1 measures again what has not changed since.
ONLY ?=
FORCE ?=
bench-report: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/report.py --only "$(ONLY)" $(if $(FORCE),--force)

run_eval: $(VENV)/.installed-dev
	$(BIN)/python run_eval.py --model_name_or_path $(MODEL) --eval_path $(EVAL_PATH) $(EVAL_FLAGS)

# The same with the model divided among processes.
run_eval_tps: $(VENV)/.installed-dev
	$(BIN)/python run_eval.py --num_processes $(TENSOR_PARALLEL_DEGREE) \
		--tensor_parallel_degree $(TENSOR_PARALLEL_DEGREE) --model_name_or_path $(MODEL) --eval_path $(EVAL_PATH) $(EVAL_FLAGS)

# The lock pins every version that the tests were run with; the package itself allows ranges.
$(VENV)/.installed-demo: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[plots,metrics,serve]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[dev]'
	touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-docs: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint requirements.lock --editable '.[docs,plots,metrics,serve]'
	touch $@

clean:
	rm -rf $(VENV) demo build dist site *.egg-info
