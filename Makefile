# make install      the environment, in .venv
# make quickstart   a small mixture of experts against a dense model, on real text, in minutes
# make test         the tests; test-nightly adds their long forms
# make lint         style and types

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install quickstart test test-nightly lint typecheck

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("sparsegate needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	touch $@

quickstart: install
	$(BIN)/sparsegate quickstart

test: install
	$(BIN)/pytest -n 2 --dist worksteal

test-nightly: install
	$(BIN)/pytest -n 2 --dist worksteal -m '' --hypothesis-profile nightly

lint: install typecheck
	$(BIN)/ruff check
	$(BIN)/ruff format --check

typecheck: install
	$(BIN)/pyrefly check
