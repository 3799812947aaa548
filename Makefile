# make train   train a small NIN from scratch and draw its curves (DATA=/path/to/tiny-imagenet-200 for images of your own)
# make test    run the test suite            make check   lint, types and tests
# make test-isa       what concerns oneDNN, as on a processor without AVX-512
# make test-kernels   run the CUDA kernels emulated, checked, in several orders      make test-gpu   test them on a GPU (needs CuPy)
# make gpu-wheels   packages for a machine with a GPU and no network (GPU_PYTHON=3.12)
# make lint    ruff and mypy                 make proto   compile proto/caffelite.proto again
# make clean   remove what these made; data/ and runs/ stay
#
# PYTHON=python3.12 chooses the interpreter, 3.10 or newer. Everything is installed into .venv with pip.

PYTHON ?= python3
DATA ?=
TESTS ?= tests
WORKERS ?= auto
GPU_PYTHON ?= 3.12

VENV := .venv
BIN := $(VENV)/bin
PROTO_VENV := .cache/proto-venv

.PHONY: train test test-isa test-kernels test-gpu gpu-wheels check lint proto clean
.DELETE_ON_ERROR:

train: $(VENV)/installed-run
	@$(BIN)/python tools/train_demo.py $(if $(DATA),--data "$(DATA)")

# Test workers share the processors: their idle threads had better sleep than spin. CUDA kernels are emulated where there is a C++ compiler.
test: $(VENV)/installed-dev
	OMP_WAIT_POLICY=passive CAFFELITE_CUDA_DRIVER=$(if $(shell command -v g++),emulator) $(BIN)/python -m pytest -n $(WORKERS) $(TESTS)

# What concerns oneDNN again, as on a processor without AVX-512, where it has fewer primitives.
ISA_TESTS := $(wildcard tests/test_onednn*.py tests/test_op_*.py) tests/test_net_random.py
test-isa: $(VENV)/installed-dev
	ONEDNN_MAX_CPU_ISA=AVX2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(WORKERS) --backend onednn $(ISA_TESTS)

# The ops again, and every tile of their products, with the emulator watching every access, and then with its threads in other orders.
KERNEL_TESTS := $(wildcard tests/test_op_*.py) tests/test_cuda_gemm.py tests/test_cuda_gemm_gaps.py
test-kernels: $(VENV)/installed-dev
	CAFFELITE_CUDA_DRIVER=emulator CAFFELITE_EMULATOR=check $(BIN)/python -m pytest -n $(WORKERS) --backend cuda $(KERNEL_TESTS)
	set -e; for order in down random lifo; do CAFFELITE_CUDA_DRIVER=emulator CAFFELITE_EMULATOR_ORDER=$$order \
		$(BIN)/python -m pytest -n $(WORKERS) --backend cuda $(KERNEL_TESTS); done

# On a machine with a GPU.
test-gpu: $(VENV)/installed-dev
	CAFFELITE_CUDA_DRIVER=cupy $(BIN)/python benchmarks/gpu_tests.py

# For benchmarks/gpu.py on a machine without a network, Linux on x86-64: what caffelite and its tests import, for the Python of that machine.
gpu-wheels: $(VENV)/bin/python
	rm -rf build/wheels
	$(BIN)/python -m pip download --quiet --only-binary=:all: --no-deps --python-version $(GPU_PYTHON) --implementation cp \
		$(foreach tag,2_28 2_27 2_26 2_17,--platform manylinux_$(tag)_x86_64) --platform manylinux2014_x86_64 --dest build/wheels \
		"numpy>=1.26" "protobuf>=4.25" "pillow>=10" "lmdb>=1.4" "ml_dtypes>=0.4" "pytest>=8" pluggy iniconfig packaging pygments
	@du -sh build/wheels

check: lint test

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	@command -v "$(PYTHON)" >/dev/null || { echo "make: $(PYTHON) was not found; name a Python of 3.10 or newer with PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "make: $(PYTHON) does not run or is older than 3.10; name a Python of 3.10 or newer with PYTHON=..." >&2; exit 1; }
	@echo '"$(PYTHON)" -m venv $(VENV)'
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); echo "make: no virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

# pip runs once, and again when what it installs has changed; a failed run leaves no mark.
$(VENV)/installed-run: pyproject.toml setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[plot]"
	@touch $@

$(VENV)/installed-dev: pyproject.toml setup.py | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@ $(VENV)/installed-run

# In an environment of its own: the compiler wants an older protobuf than caffelite runs on.
proto:
	test -x $(PROTO_VENV)/bin/python || "$(PYTHON)" -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/python -m pip install --quiet "grpcio-tools==1.62.3" "setuptools<81"
	$(PROTO_VENV)/bin/python tools/generate_proto.py

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find caffelite tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
