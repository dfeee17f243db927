# make pretrain   train the small model of configs/tiny.json from nothing to a perplexity and a picture
# make test       the test suite
# make test-layouts   many layouts of up to eight ranks against one process; goes on where it was stopped
# make test-faults    thousands of kills, bad disks, signals, hostile files and configs; goes on where it was stopped
# make test-soak      an hour of faults, one after the other, in a run that is started again each time
# make test-gpu   on a machine with a GPU: kernels and libraries against the reference
# make rehearse-gpu without one: what the host does in those tests, over a runtime that has no card; installs 5 GB
# make test-slurm  the SLURM job script in a private SLURM of two nodes; needs root and Debian's slurm-wlm and munge
# make check-cuda without one: CUTLASS kernels compiled for A100 and Hopper
# make check      lint, format, types
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN := runs/tiny

.PHONY: pretrain test test-gpu rehearse-gpu check-cuda test-slow test-layouts test-faults test-soak test-slurm check style clean

pretrain: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed launch/pretrain.py --config configs/tiny.json
	@echo "the picture of the loss: $(RUN)/loss.png; to go on by hand: source $(VENV)/bin/activate"

test: $(INSTALLED)
	$(BIN)/pytest -m "not slow and not slurm" -n 2 --dist loadfile --no-loadscope-reorder

# On a machine with a GPU: every kernel and library against the reference. One process: the tests share the card.
test-gpu: $(INSTALLED)
	$(BIN)/pytest -m gpu -rs

# The host's part of the same tests, without a GPU: not of 200 steps, which take too long, not of peaks of memory, which plain
# torch in place of Triton raises, and not of kernels, which `make test` runs under the interpreter.
rehearse-gpu:
	tests/rehearsal/rehearse.sh python -m pytest -m gpu -rfE tests/checkpoint tests/layers tests/models tests/parallel tests/sparse/test_on_gpu.py

# Without a GPU: every CUTLASS kernel compiled for A100 and Hopper. Needs nvcc; a minute or two for each kernel.
check-cuda: $(INSTALLED)
	@# Without what it depends on, which its headers do not need.
	$(BIN)/python -c 'import cutlass_library' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check --no-deps nvidia-cutlass==4.2.0.0
	$(BIN)/python -m slope_dist.sparse.kernels.cutlass.build --arch sm_80 sm_90a --compile-only

# Minutes: trainings under a real SLURM on this machine. Skipped, with the reason, where it cannot be.
test-slurm: $(INSTALLED)
	$(BIN)/pytest -m slurm tests/slurm -rs

# What takes minutes, such as `make pretrain` itself in a fresh clone.
test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow

# Minutes; results are kept in build/layouts until the sources change.
test-layouts: $(INSTALLED)
	$(BIN)/python -m tests.layouts

# Hours for all; results are kept in build/faults until the sources change. One kind, or for five minutes:
# .venv/bin/python -m tests.faults truncation --minutes 5
test-faults: $(INSTALLED)
	$(BIN)/python -m tests.faults

# An hour; `.venv/bin/python -m tests.faults.soak --minutes 5` for less.
test-soak: $(INSTALLED)
	$(BIN)/python -m tests.faults.soak

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# DS_BUILD_OPS=0: DeepSpeed's own kernels are compiled at first use, if ever, not here.
$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11; say which one to use: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@# torch for CUDA brings the triton that it wants; elsewhere kernels run under the interpreter of one that is known to.
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check -e '.[interpreter]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
