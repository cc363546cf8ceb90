PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
WORKERS ?= 2
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
DEMO   := out/gemma-3-270m-demo
# With cached bytecode, torch loads in seconds instead of a minute.
unexport PYTHONDONTWRITEBYTECODE
# The same settings as in gemma_runtime/privacy.py, for scripts that import a library first.
export ORT_DISABLE_TELEMETRY    ?= 1
export ORT_TELEMETRY_DISABLED   ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: demo conformance campaign fuzz soak test test-python test-slow test-lowest test-android test-ios test-arm64 check docs format clean

demo: $(VENV)/.demo
	$(BIN)/gemma-export --target onnx --checkpoint demo --quant int8 --output $(DEMO) --force
	$(BIN)/gemma-runtime verify $(DEMO)
	$(BIN)/gemma-runtime run $(DEMO) "The three primary colours are" --max-new-tokens 40
	$(BIN)/gemma-runtime bench $(DEMO)

# Our targets, llama.cpp and both attentions of transformers, on every tiny checkpoint: 49 processes that load torch.
conformance: $(VENV)/.dev
	rm -rf out/conformance
	mkdir -p out/conformance
	$(BIN)/gemma-conformance make out/conformance/kit
	$(ONE_THREAD) $(BIN)/gemma-conformance run out/conformance/kit \
		--systems transformers-eager,transformers-sdpa,gemma-onnx,gemma-executorch,gemma-coreml,gemma-coreai,llama.cpp \
		--json out/conformance/matrix.json --html out/conformance/matrix.html

# 300 kills and 300 failing system calls on a tiny model: about half an hour on two cores.
campaign: $(VENV)/.dev
	rm -rf out/campaign
	mkdir -p out
	$(BIN)/python -m tests.campaign out/campaign

# 3,000 damaged inputs for each of 53 readers of untrusted bytes: some minutes on one core.
fuzz: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m tests.fuzz --runs 3000

# 200,000 tokens in one session, and 1,000 sessions, on the tiny bundle: some minutes.
soak: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m tests.soak

# Two at a time: most of each is a compiler or an emulator that uses one core.
test: test-python
	+$(MAKE) --jobs=2 --output-sync=target test-android test-ios test-arm64 test-lowest

# One thread per worker. All tests of a file run in one worker, because they share bundles.
test-python: $(VENV)/.dev
	$(ONE_THREAD) $(BIN)/python -m pytest -m "not serial and not slow" --numprocesses=$(WORKERS) --dist=loadscope
	$(BIN)/python -m pytest -m "serial and not slow"

# Calibrates the real 270M: five minutes.
test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

# The runtime's tests with the lowest versions that pyproject.toml allows.
test-lowest:
	PYTHON=$(PYTHON) scripts/test_lowest.sh

test-android: $(VENV)/.dev
	PYTHON=$(BIN)/python android_demo/test.sh

test-ios: $(VENV)/.dev
	PYTHON=$(BIN)/python ios_demo/test.sh

test-arm64: $(VENV)/.dev
	PYTHON=$(BIN)/python tests/arm64/test.sh

check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	PYTHONPATH=export:runtime $(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: $(VENV)/.dev
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) out build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Install torch first and pinned, so that no other package pulls in another version or build.
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml optimum_hook/pyproject.toml conformance/pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e '.[dev]' -e optimum_hook -e conformance
	touch $@
