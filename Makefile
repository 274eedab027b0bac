# make quickstart   set up, then fine-tune the model that ships in the package and show what it learned
# make test         set up, then run the tests
# make test-all     the long matrices: every combination of layout, recipe, weights, packing and micro-batch
# make check        lint, format and types
# make benchmark    side by side with transformers and TRL; prints a table (minutes)

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test test-all check format benchmark clean

.venv/base: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing tunesmith and what it needs into .venv (PyTorch is large: this can take minutes) ..."
	@$(PIP) -e .
	@touch $@

.venv/test: .venv/base
	@echo "Installing what the tests need ..."
	@$(PIP) -e '.[test]'
	@touch $@

# Builds llama.cpp from its sources, which needs a C++ compiler and takes minutes. Tests of GGUF files run it where it is there.
.venv/llama: .venv/test
	@echo "Building llama.cpp ..."
	@$(PIP) -e '.[llama]'
	@touch $@

.venv/bench: .venv/base
	@$(PIP) -e '.[bench]'
	@touch $@

quickstart: .venv/base
	@$(BIN)/python -m tunesmith.recipes.quickstart

test: .venv/test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

test-all: .venv/test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m slow

check: .venv/test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

format: .venv/test
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

benchmark: .venv/bench
	@$(BIN)/python benchmarks/run.py

clean:
	rm -rf .venv build *.egg-info quickstart
