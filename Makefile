# Both targets are complete by themselves: a fresh clone, Python 3.12 and PyPI are enough.
PYTHON ?= $(shell command -v python3.12 || command -v python3)
VENV   := .venv
WORKDIR ?= runs/smollm2

.PHONY: demo test gpu-test compiler lint clean

demo: $(VENV)/experiments.stamp
	$(VENV)/bin/python -m experiments.quantize --config=configs/smollm2.py --workdir=$(WORKDIR)

# A worker that crashes ends the run: pytest-xdist would wait for the rest of its file for ever.
test: $(VENV)/test.stamp
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --max-worker-restart 0

# On a Hopper GPU: minutes; needs JAX with CUDA. The summary, gpu_test.json, goes to the folder $OUT, or to runs/.
GPU_PYTHON ?= $(or $(wildcard $(VENV)/bin/python),python3)
gpu-test:
	$(GPU_PYTHON) -m tests.gpu.run

# What tests need to compile the GPU kernels to machine code without a GPU (142 MB); they skip that where it is absent.
compiler: $(VENV)/compiler.stamp

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12) and "Python 3.12 is needed, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.stamp: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) runs
