# `make demo` and `make test` set up .venv on first use and need nothing but Python 3.10 or newer.
# To use an environment that has the packages already: make test-gpu PY=python3

PYTHON ?= python3
VENV   ?= .venv
PY     ?= $(VENV)/bin/python
TORCH  ?= torch==2.13.0
JOBS   ?= 2

READY := $(VENV)/.ready
# Only our own environment is set up by us.
ENV   := $(if $(filter $(VENV)/bin/python,$(PY)),$(READY))

.PHONY: demo test check format test-gpu bench clean

demo: $(ENV)
	$(PY) -m bench.demo

test: check
	$(PY) -m pytest -n $(JOBS) -m "not gpu"

check: $(ENV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(ENV)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

test-gpu: $(ENV)
	$(PY) -m pytest -m gpu tests

bench: $(ENV)
	$(PY) -m bench.attention
	$(PY) -m bench.feed_forward
	$(PY) -m bench.chain
	$(PY) -m bench.siblings
	$(PY) -m bench.encoder
	$(PY) -m bench.training
	$(PY) -m bench.decode
	$(PY) -m bench.memory
	$(PY) -m bench.choices
	$(PY) -m bench.compile_time
	$(PY) -m bench.fidelity
	$(PY) -m bench.finetune

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
