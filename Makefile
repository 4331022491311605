# The two commands of the README are `make run` and `make test`; each sets the checkout up first where that is still needed.

VENV := .venv
BIN := $(VENV)/bin
PYTHON_IN_VENV := $(BIN)/python
SETUP_INPUTS := pyproject.toml tools/setup.sh

# Two workers fit the smallest machine that this is tested on; a hung test ends by pytest's timeout (pyproject.toml).
WORKERS ?= 2
FUZZ_SECONDS ?= 60

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: $(VENV)/stamp-run  ## boot the demo kernel with gdb on it (no terminal: a short scripted session)
	@PATH="$$PATH:$(CURDIR)/$(BIN)" $(PYTHON_IN_VENV) -m tools.demo

.PHONY: test
test: lint types  ## everything that CI runs: lint, types, all tests
	@echo "== pytest: all tests"
	$(BIN)/pytest -n $(WORKERS) --dist worksteal --durations 15

.PHONY: quick
quick: $(VENV)/stamp-test  ## unit tests only: no other program, no network
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m "not slow" --ignore tests/system

.PHONY: lint
lint: $(VENV)/stamp-test  ## ruff: rules and formatting
	@echo "== ruff"
	$(BIN)/ruff check
	$(BIN)/ruff format --check

.PHONY: types
types: $(VENV)/stamp-test  ## mypy, strict
	@echo "== mypy"
	$(BIN)/mypy

.PHONY: format
format: $(VENV)/stamp-test  ## let ruff rewrite the sources
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: bench
bench: $(VENV)/stamp-run  ## the benchmarks, with a progress bar
	@$(BIN)/trapgate bench

.PHONY: fuzz
fuzz: $(VENV)/stamp-fuzz  ## run each fuzzer in tests/fuzz for FUZZ_SECONDS (60)
	@set -e; for fuzzer in tests/fuzz/fuzz_*.py; do \
		module=$$(echo "$${fuzzer%.py}" | tr / .); \
		echo "== $$module for $(FUZZ_SECONDS) s"; \
		$(PYTHON_IN_VENV) -m "$$module" -max_total_time=$(FUZZ_SECONDS); \
	done

.PHONY: wheel
wheel: $(VENV)/stamp-test  ## build the source distribution and the wheel into dist/
	$(PYTHON_IN_VENV) -m build --outdir dist .

.PHONY: setup
setup: $(VENV)/stamp-test  ## only set up: the virtual environment and the tools that the tests need

.PHONY: clean
clean:  ## remove what was built, the virtual environment too
	rm -rf $(VENV) build dist *.egg-info .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp says that the set-up for one purpose was done with these inputs.
$(VENV)/stamp-%: $(SETUP_INPUTS)
	@tools/setup.sh $*
