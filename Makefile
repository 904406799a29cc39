# What a contributor and CI run. Every target may be run again: what is done is skipped.
#   make demo   the quickstart sweep, from nothing to Pareto fronts
#   make rehearse  the flagship sweeps (SD, transformers) on shrunk models, to their fronts
#   make check  formatting, lint, types, walls between modules      make test  all tests but the marked ones
#   make test-cluster  faults of all kinds on a Ray cluster of several nodes on loopback

VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SWEEP ?= sweeps/quickstart.yaml
PYTHON ?=
PYTEST_ARGS ?=
# Test files are dealt out to so many processes, each on one thread.
TEST_PROCESSES ?= 2

# One thread a process: tests and Ray workers run side by side, more threads only get in their way.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

# REHEARSE_ARGS: such as sd_family, or --folder /tmp/rehearsal to go on where it ended.
REHEARSE_ARGS ?=

.PHONY: install demo rehearse test test-cluster check format bench clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt scripts/make_venv.sh
	@PYTHON="$(PYTHON)" bash scripts/make_venv.sh "$(VENV)"
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/dipgo-sweep run $(SWEEP)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

rehearse: $(INSTALLED)
	$(BIN)/python scripts/rehearse.py $(REHEARSE_ARGS)

# One process: every test has the machine, and the cluster of several nodes on it, for itself.
test-cluster: $(INSTALLED)
	$(BIN)/python -m pytest -m cluster --durations=0 $(PYTEST_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=. $(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

# Leaves results (.dipgo, mlflow.db) alone.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
