# Each target sets up everything it needs in .venv: Python >= 3.10, a C compiler and a package index are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := $(VENV)/.ready-demo
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Where it is set, every command that a test starts compiles all of pkd anew.
export PYTHONDONTWRITEBYTECODE =

.PHONY: help demo check test-fast test docs docs-serve soak bench results vendor dist sbom clean
.DEFAULT_GOAL := help

help: ## this list
	@echo "make TARGET, one of:"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'

$(VENV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pkd needs Python 3.10 or newer: make PYTHON=python3.12")'
	@test -e pkd/toolkit/__init__.py || { echo "pkd/toolkit is no link to toolkit/. Clone again with symbolic links:" \
	    "git clone -c core.symlinks=true URL" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Editable, so that a change to the code needs no new install; the stamps are renewed when the dependencies change.
$(READY): pyproject.toml | $(VENV)
	$(PIP) --editable '.[dev]'
	touch $(READY) $(DEMO)

$(DEMO): pyproject.toml | $(VENV)
	@echo "Installing what the demo needs: about 1.5 GB in .venv with torch's CPU build, which this takes where the package"
	@echo "index has it. On plain PyPI, Linux gets torch's CUDA build instead, several GB more. For the small one:"
	@echo "    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo"
	$(PIP) --editable '.[demo]'
	touch $(DEMO)

# make demo FACES=photos-aligned TEACHER=teacher.onnx PREPROCESS=channels=rgb,mean=127.5,std=127.5
demo: $(DEMO) ## the whole product on procedural faces, 5 minutes: demo/report.html
	$(BIN)/pkd-demo --out demo $(if $(FACES),--faces '$(FACES)') $(if $(TEACHER),--teacher '$(TEACHER)') \
	    $(if $(PREPROCESS),--teacher-preprocess '$(PREPROCESS)')

check: $(READY) ## everything but tests, under a minute: lint, format, types, imports, prose, docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests tools benchmarks examples
	$(BIN)/lint-imports
	$(BIN)/python tools/prose.py
	REFERENCE=false NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test-fast: $(READY) ## the tests to run while you work, two minutes: nothing slow, no Milvus
	$(BIN)/pytest -n logical --dist loadfile --no-loadscope-reorder -m "not slow and not milvus and not gpu and not network" tests/unit

test: check ## what CI runs: check, then every test
	$(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

docs: $(READY) ## the documentation with its API reference: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(READY) ## the documentation while you write it: http://127.0.0.1:8001
	REFERENCE=false NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --dev-addr 127.0.0.1:8001

soak: $(READY) ## the long forms of the tests that have one, two hours
	$(BIN)/pytest -m soak --soak --timeout 7200

bench: $(READY) ## every benchmark, hours: benchmarks/results/, docs/performance.md
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

results: $(READY) ## students of real teachers on real faces, a day of one core: docs/results.md, docs/adoption.md
	$(BIN)/python benchmarks/adoption.py --runs runs/students
	$(BIN)/python benchmarks/adopted_methods.py
	$(BIN)/python benchmarks/ablation.py
	$(BIN)/python benchmarks/sizes.py
	$(BIN)/python benchmarks/real_faces.py
	$(BIN)/python benchmarks/method_table.py
	$(BIN)/python benchmarks/performance.py

vendor: $(READY) ## onnxruntime-web for browsers, anew from tools/vendor/package-lock.json: serving/web/vendor
	cd tools/vendor && npm ci --ignore-scripts --no-audit --no-fund
	cp tools/vendor/node_modules/onnxruntime-web/dist/ort.wasm.min.mjs \
	    tools/vendor/node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.mjs serving/web/vendor
	gzip -n -9 -c tools/vendor/node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.wasm \
	    > serving/web/vendor/ort-wasm-simd-threaded.wasm.gz
	cp tools/vendor/node_modules/onnxruntime-web/dist/ort.jspi.min.mjs \
	    tools/vendor/node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.jspi.mjs serving/web/vendor
	gzip -n -9 -c tools/vendor/node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.jspi.wasm \
	    > serving/web/vendor/ort-wasm-simd-threaded.jspi.wasm.gz
	of=$$($(BIN)/python -c 'import onnxruntime; print(*onnxruntime.__path__)') && \
	    cp "$$of/LICENSE" "$$of/ThirdPartyNotices.txt" serving/web/vendor
	cd serving/web/vendor && sha256sum -- *.mjs *.wasm.gz LICENSE ThirdPartyNotices.txt > SHA256SUMS
	rm -rf tools/vendor/node_modules

dist: $(READY) ## a wheel and an sdist: dist/
	$(BIN)/python -m build

sbom: $(READY) ## bill of materials (CycloneDX) of what pkd[serve] installs: dist/sbom.cdx.json
	rm -rf build/sbom && $(PYTHON) -m venv build/sbom
	build/sbom/bin/python -m pip install --quiet --disable-pip-version-check '.[serve]'
	rm -rf *.egg-info build/lib build/bdist.*  # pytest would find their entry points
	$(BIN)/python tools/sbom.py build/sbom/bin/python dist/sbom.cdx.json

clean: ## remove .venv, built files and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist site *.egg-info
