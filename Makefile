# Everything a newcomer runs; each target makes the virtual environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint types bench gpu-report gpu-bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.train
	$(BIN)/prefopt-fast demo

test: lint types
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy follows files, not setup.py's package_dir, so it is shown the tree as it is installed.
types: $(VENV)/.test
	rm -rf build/types && mkdir -p build/types
	cp -r prefopt_fast build/types/ && cp -r kernels reference build/types/prefopt_fast/
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p prefopt_fast

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(VENV)/bin/python pyproject.toml setup.py constraints.txt
	$(PIP) -e '.[train]'
	touch $@

$(VENV)/.test: $(VENV)/.train
	$(PIP) -e '.[test]'
	touch $@

# PREFOPT_FAST_MODEL and PREFOPT_FAST_DATA name a model and preference pairs for real inputs.
bench: $(VENV)/.test
	$(BIN)/prefopt-fast bench $(ARGS)

# Compiled without a GPU, so never in Triton's interpreter.
gpu-report: $(VENV)/.test
	env -u TRITON_INTERPRET $(BIN)/python benchmarks/gpu_report.py

# Runs in the python that has torch and Triton for this machine's GPU; nothing is installed.
gpu-bench:
	$(PYTHON) setup.py -q build --build-base build/gpu
	PYTHONPATH="build/gpu/lib:$$PYTHONPATH" $(PYTHON) benchmarks/gpu_bench.py $(ARGS)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
