# `make demo` and `make test` work on a fresh machine with Python 3.11 or newer; nothing outside this folder is changed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test check slow bench lint types docs site clean

$(VENV)/.train: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[train]'
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(PIP) --editable '.[train,dev,docs]'
	touch $@

demo: $(VENV)/.train  ## the whole way on built-in chats: check, encode, train, report
	$(BIN)/chatloss demo --output demo-out

test: $(VENV)/.dev  ## what needs seconds; the browser tests need Chromium
	$(BIN)/python -m pytest -n auto -m "not slow" $(PYTEST)

slow: $(VENV)/.dev  ## what needs minutes or larger downloads
	$(BIN)/python -m pytest -n auto -m slow $(PYTEST)

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.dev  ## rewrite docs/cli.md from --help
	$(BIN)/python -m scripts.cli_docs

site: $(VENV)/.dev  ## the documentation as a site, in site/; the tests build it too
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

check: lint types test  ## what CI runs

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) demo-out dist site build .pytest_cache .mypy_cache .ruff_cache
