# Seven verbs, each makes the virtual environment it needs. PIP_ARGS reaches pip, PYTHON picks the interpreter, ARGS goes to demo, test and bench.
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
BIN := .venv/bin
PIP_INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS)
PROTOS := decentra/pb/averaging.proto decentra/pb/messages.proto

.PHONY: demo test check bench acceptance chaos proto

demo: .venv/.run ; $(BIN)/decentra demo $(ARGS)
test: .venv/.dev ; $(BIN)/python -m pytest -n 2 $(ARGS)
check: .venv/.dev ; $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports
bench: .venv/.dev .venv-torchft/.ready ; $(BIN)/python -m tests.bench.all $(ARGS)
acceptance: .venv/.dev ; $(BIN)/python -m tests.acceptance.modularity $(ARGS)
chaos: .venv/.dev ; $(BIN)/python -m tests.chaos.all $(ARGS)
proto: .venv-proto/.ready ; .venv-proto/bin/python -m grpc_tools.protoc -I proto --python_out=. --pyi_out=. $(PROTOS) && cat $(PROTOS:%=proto/%) | sha256sum | cut -c1-64 > decentra/pb/PROTO_SHA256

# ---- environments: made once; installed again when pyproject.toml changes

.venv/.run: pyproject.toml | .venv/bin/python
	$(PIP_INSTALL) -e . && touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	$(PIP_INSTALL) -e '.[dev]' && touch $@ .venv/.run

.venv/bin/python:
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: sudo apt install $$($(PYTHON) -c 'import sys; print(f"python3.{sys.version_info[1]}-venv")' 2>/dev/null || echo python3.11-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' || { echo "decentra needs Python 3.11 to 3.14, $(PYTHON) is $$($(PYTHON) -V); try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# Its own environment: a rival to measure against, with dependencies of its own.
.venv-torchft/.ready:
	$(PYTHON) -m venv .venv-torchft && .venv-torchft/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) 'torch>=2.10,<2.14' 'torchft==0.2.0' numpy && touch $@

# Its own environment: grpcio-tools wants another protobuf than the one decentra runs with.
.venv-proto/.ready:
	$(PYTHON) -m venv .venv-proto && .venv-proto/bin/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) 'grpcio-tools==1.76.*' && touch $@
