# Two commands from a fresh clone: `make quickstart` and `make test`. ACCEL=gpu takes the CUDA build of torch and vLLM.

PYTHON ?= python3
ACCEL ?= cpu
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(ACCEL)
READY_DEV := $(VENV)/.ready-dev-$(ACCEL)

# uv does not read pip's settings: pass a local folder of wheels and the machine's own certificates on to it.
# Byte code is compiled once here: every engine and every worker is a process that imports the whole stack.
unexport PYTHONDONTWRITEBYTECODE
UV := UV_SYSTEM_CERTS=1 $(if $(PIP_FIND_LINKS),UV_FIND_LINKS="$(PIP_FIND_LINKS)") $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python
# Without a folder of wheels the CPU build of torch comes from PyTorch's own index.
BACKEND_cpu := $(if $(PIP_FIND_LINKS),,--torch-backend cpu)
# The CPU build of vLLM asks for packages that have no CPU build and that nothing here uses.
OVERRIDE_cpu := --override requirements/cpu-overrides.txt
INSTALL = $(UV) $(BACKEND_$(ACCEL)) $(OVERRIDE_$(ACCEL)) --constraint requirements/constraints.txt

.PHONY: install quickstart full test fast soak audit playground matrix lint format clean

install: $(READY)  ## the environment alone

quickstart: $(READY)  ## prompts -> teacher -> curated rows -> tuned student -> scores -> report.html
	$(BIN)/itune pipeline jobs/pipeline/quickstart.yaml

full: $(READY)  ## the quickstart's loop, and distillation, pruning with healing, and a sweep of rank x sparsity
	$(BIN)/itune pipeline jobs/pipeline/full.yaml

test: $(READY_DEV)  ## everything but the soak tests, on real Ray, vLLM and processes
	$(BIN)/python -m pytest -m "not soak" -n 2 --dist loadfile --no-loadscope-reorder

fast: $(READY_DEV)  ## the inner loop
	$(BIN)/python -m pytest -m "not real and not soak" -n 2

soak: $(READY_DEV)  ## long fault and endurance tests
	$(BIN)/python -m pytest -m soak --timeout 1800

audit: $(READY_DEV)  ## known vulnerabilities of the pinned packages; needs the network
	$(BIN)/python requirements/audit.py

playground: $(READY)  ## rebuild the shipped models by ordinary train jobs
	$(BIN)/python jobs/playground/build.py

matrix: $(READY)  ## every objective and every parameter-efficient method learns: a table of measured figures
	$(BIN)/python jobs/train/matrix.py

lint: $(READY_DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(READY_DEV)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(BIN)/uv:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: PYTHON=python3.11 make ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv==0.13.8

$(READY): pyproject.toml requirements/constraints.txt requirements/cpu-overrides.txt | $(BIN)/uv
	$(INSTALL) --editable ".[$(ACCEL),train]"
	touch $@

$(READY_DEV): $(READY)
	$(INSTALL) --editable ".[$(ACCEL),train,dev]"
	touch $@

clean:
	rm -rf $(VENV) runs
