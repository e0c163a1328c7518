# A fresh clone, Python 3.12 and PyPI are enough for every target but gpu-test.
PYTHON ?= $(shell command -v python3.12 || command -v python3)
VENV   := .venv
WORKDIR ?= runs/demo
# Programs that tests start, and later runs, read the bytecode that the first process writes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-fast test-exhaustive processes lint gpu-test compiler clean

demo: $(VENV)/experiments.stamp
	$(VENV)/bin/python -m experiments.calibrate --config=configs/demo.py --workdir=$(WORKDIR)

# A worker that crashes ends the run: pytest-xdist would wait for the rest of its file for ever. Files run in the order
# of tests/conftest.py: xdist's own leaves files of few tests to the end, which are the longest.
PYTEST := $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test: lint
	$(PYTEST)

# Every case of the tests that otherwise run a sample of theirs, with the code that XLA generates by default.
test-exhaustive: lint
	TEST_NEWER_EMITTERS=1 $(PYTEST) --exhaustive

# Runs a model and a training step on a mesh in two and in four real processes, then trains, kills a worker and then
# process 0, and compares the losses: half an hour on two cores.
processes: $(VENV)/test.stamp
	for count in 2 4; do \
	$(VENV)/bin/python -m tests.models.sharding.on_meshes --processes=$$count --generates --trains tested || exit 1; \
	$(VENV)/bin/python -m tests.experiments.distributed.processes_that_die --processes=$$count --data=$$((count / 2)) \
	--folder=runs/processes_$$count || exit 1; done

# Minutes: all but the Hopper kernels, whole models, the programs and damaged files; one case of sampled tests.
SLOW := kernels/sm90 models experiments gpu fuzz
test-fast: lint
	$(PYTEST) --fast $(SLOW:%=--ignore tests/%)

lint: $(VENV)/test.stamp
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

# On a Hopper GPU: minutes; GPU_PYTHON needs JAX with CUDA (`pip install -e '.[cuda13]'`). The summary, gpu_test.json, goes to the folder $OUT, or to runs/.
GPU_PYTHON ?= $(or $(wildcard $(VENV)/bin/python),python3)
gpu-test:
	$(GPU_PYTHON) -m tests.gpu.run

# Tests that compile the GPU kernels need JAX's CUDA plugin and ptxas (142 MB to download), and skip without them. They
# get a folder of their own, where JAX does not find them: the plugin would fail in every program on a machine without
# a GPU.
compiler: $(VENV)/compiler.stamp

$(VENV)/compiler.stamp: pyproject.toml | $(VENV)/bin/python
	rm -rf $(VENV)/compiler
	$(VENV)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["compiler"], sep="\n")' > $(VENV)/compiler.txt
	$(VENV)/bin/python -m pip install --quiet --target $(VENV)/compiler --requirement $(VENV)/compiler.txt
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12) and "Python 3.12 is needed, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.stamp: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) runs
