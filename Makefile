# make setup: everything into .venv; make demo; make serve; make test; make containers
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two tests at a time; those that share servers or a file run in one process.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: setup demo serve test unit lint containers

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml scripts/setup.sh scripts/small_model.py scripts/from_gguf.py
	PYTHON=$(PYTHON) VENV=$(VENV) bash scripts/setup.sh
	touch $@

demo: setup
	$(BIN)/lenvm demo

serve: setup
	$(BIN)/lenvm demo --serve

test: setup
	$(PYTEST)

unit: setup
	$(PYTEST) -m "not e2e"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Builds the images and runs the compose file's cpu profile (tests/containers).
containers: setup
	@$(BIN)/python -m tests.containers $(VENV)/share/SmolLM2-135M-Instruct
