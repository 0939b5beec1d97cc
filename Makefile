# Everything works in .venv, installed from requirements.txt on first use; PYTHON=python3.13 chooses its Python.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test format

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1: /p' Makefile

demo: .venv/installed  ## trains a small network on a generated VOC-style set: no download, no GPU, about a minute
	$(BIN)/python experiments/voc_cls.py init=kmeans preset=demo

test: .venv/installed  ## lint, types and tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

format: .venv/installed  ## brings all files into ruff's form
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The stamp is touched last, so that an installation which was cut off goes on the next time.
.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.exit( \
	  "Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is %d.%d: make PYTHON=python3.13" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-build-isolation --no-deps -e .
	@touch $@
