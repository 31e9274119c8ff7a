# make train      train a small language model on real text, evaluate it, draw its reliability diagram
# make test       formatting, lint, types and the tests, on the CPU, in a few minutes
# make slow       the tests that take long: the kernels' interpreter, whole runs (.ci/run has all)
# make lint       formatting, lint and types alone
# make test-gpu   the loss, its kernels and a training step on this machine's GPU
#
# The first call makes .venv and installs the pinned packages there; later ones install nothing.
# Flags go in ARGS (make train ARGS="--steps 50"), jax's GPU packages in EXTRAS (EXTRAS=cuda13).

VENV := .venv
PYTHON := $(VENV)/bin/python
ARGS ?=
EXTRAS ?=
JOBS ?= 2
JAX := 0.11.2
ON_A_GPU := tests/lsce/test_loss.py tests/lsce/backends/hopper/test_gpu.py \
	tests/train/run/test_gpu.py
# A worker that is done takes tests from the others.
ON_THE_CPU = JAX_PLATFORMS=cpu $(PYTHON) -m pytest -n $(JOBS) --dist worksteal
INSTALLED := $(VENV)/installed$(EXTRAS:%=-%)

.PHONY: train test slow test-gpu lint lock python
.DELETE_ON_ERROR:

train: $(INSTALLED)
	$(PYTHON) -m train $(ARGS)

lint: $(INSTALLED)
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m ruff check
	$(PYTHON) -m pyright

test: lint
	$(ON_THE_CPU) -m "not slow" $(ARGS)

slow: $(INSTALLED)
	$(ON_THE_CPU) -m slow $(ARGS)

test-gpu: $(INSTALLED)
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON) -m pytest -n $(JOBS) $(ON_A_GPU) $(ARGS)

# A Python that can make an environment. Each is started, not just looked up: a pyenv shim on the
# PATH fails when its version is not selected, and Debian's python3 may come without venv.
FIND_PYTHON = for python in python3.14 python3.13 python3.12 \
	$$(ls -d "$$HOME"/.pyenv/versions/3.1[2-9]*/bin/python 2>/dev/null | sort -rV) python3; do \
	if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; \
	then command -v "$$python"; exit; fi; done; \
	echo "lsce needs Python 3.12 or newer with its venv module, and no such Python starts here" >&2; exit 1

python:
	@$(FIND_PYTHON)

# The mark `installing` outlives an interrupted install, and the next call then starts afresh.
$(INSTALLED): pyproject.toml requirements.lock
	@set -e; \
	if [ -e $(VENV)/installing ] || ! $(PYTHON) -m pip --version >/dev/null 2>&1; then \
		python=$$($(FIND_PYTHON)); \
		echo "Making $(VENV) with $$python"; \
		"$$python" -m venv --clear $(VENV); \
	fi; \
	touch $(VENV)/installing; \
	echo "Installing the pinned packages into $(VENV) (once; a minute or two)"; \
	pip="$(PYTHON) -m pip --disable-pip-version-check install --quiet"; \
	$$pip -r requirements.lock; \
	$$pip --no-build-isolation -c requirements.lock -e ".$(EXTRAS:%=[%])"; \
	rm $(VENV)/installing; \
	touch $@

lock: $(INSTALLED)
	$(PYTHON) -m pip install --quiet uv
	sed '/^[^#]/d' requirements.lock > requirements.lock.new
	echo "jax==$(JAX)" | $(PYTHON) -m uv pip compile pyproject.toml --quiet --no-header --no-annotate \
		--universal --python-version 3.12 --extra train --extra plot --extra dev \
		--upgrade --constraint - >> requirements.lock.new
	mv requirements.lock.new requirements.lock
