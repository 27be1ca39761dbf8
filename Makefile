# Each target sets up everything it needs in .venv: Python >= 3.10, a C compiler and a package index are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check soak bench clean
.DEFAULT_GOAL := test

# Editable, so that a change to the code needs no new install; the stamp is renewed when the dependencies change.
$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pkd needs Python 3.10 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(READY)

# make demo FACES=photos-aligned TEACHER=teacher.onnx PREPROCESS=channels=rgb,mean=127.5,std=127.5
demo: $(READY)
	$(BIN)/pkd-demo --out demo $(if $(FACES),--faces '$(FACES)') $(if $(TEACHER),--teacher '$(TEACHER)') \
	    $(if $(PREPROCESS),--teacher-preprocess '$(PREPROCESS)')

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/pytest

# The long forms of the tests that have one: about an hour and a half.
soak: $(READY)
	$(BIN)/pytest -m soak --soak --timeout 7200

bench: $(READY)
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
