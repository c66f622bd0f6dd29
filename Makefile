# make setup: everything into .venv; make demo; make serve; make test; make containers
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

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
	$(BIN)/python -m pytest

unit: setup
	$(BIN)/python -m pytest -m "not e2e"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Builds the images and runs the compose file's cpu profile (tests/containers).
containers: setup
	@$(BIN)/python -m tests.containers $(VENV)/share/SmolLM2-135M-Instruct
