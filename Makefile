# make demo | test | check | bench | proto | clean
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# For a CPU-only PyTorch on Linux: make PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" demo
PIP_ARGS ?=

.PHONY: demo test check bench proto clean
.DELETE_ON_ERROR:

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(PIP_ARGS) "torch==2.13.0"
	$(BIN)/pip install -q $(PIP_ARGS) -e ".[dev]"
	$(BIN)/pip install -q --no-deps "crypten==0.4.1"
	rm -rf $(VENV)/lib/python3*/site-packages/benchmarks  # CrypTen's wheel brings a top-level package of our benchmarks' name
	touch $@

demo: $(VENV)/installed
	$(BIN)/relucent-bench demo

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not alone" -n auto --maxprocesses 4 --dist worksteal
	$(BIN)/python -m pytest -m alone

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint deploy/Dockerfile
	$(BIN)/yamllint -s -d "{extends: default, rules: {line-length: {max: 140}, document-start: disable, braces: disable}}" deploy
	$(BIN)/kubernetes-validate --strict --quiet deploy/kubernetes/*.yaml

bench: $(VENV)/installed
	$(BIN)/relucent-bench latency

proto: $(VENV)/installed
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. protocol/relucent.proto

clean:
	rm -rf $(VENV) build dist *.egg-info
