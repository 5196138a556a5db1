# make demo: install into .venv, then run the main job.   make test: install, lint, run the tests.
# Needs python3 (3.11 or later). A second run finds the installation and starts at once.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(BIN)/nla demo

test: lint
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typing && mkdir -p build/typing && cp -r nla build/typing/ && cp -r train eval build/typing/nla/
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Got $$($(PYTHON) --version); expected Python 3.11 or later. Next: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@
