# The environment, the story, the tests. `make help` lists what there is.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: help env quickstart test test-slow check real tiny bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(BIN)/.ready ## make .venv with the exact versions of constraints.txt

$(BIN)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "truecourse needs Python 3.11 or later; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[test]'
	@touch $@

quickstart: env ## GRPO on the shipped tiny model, with live progress and a report
	$(BIN)/truecourse quickstart

test: env ## the tests
	$(BIN)/python -m pytest -n 2 -m 'not slow'

test-slow: env ## the tests marked slow
	$(BIN)/python -m pytest -m slow

check: env ## lint, types, import floors
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_floors.py

real: env ## GRPO and an evaluation with SmolLM2-135M-Instruct; options in ARGS="..."
	$(BIN)/python -m truecourse.lab.real $(ARGS)

tiny: env ## rebuild the shipped tiny model
	$(BIN)/python -m truecourse.lab.build

bench: env ## one GRPO step beside TRL's
	$(BIN)/python benchmarks/grpo_step.py

clean: ## remove the environment and caches, never runs
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache build dist
