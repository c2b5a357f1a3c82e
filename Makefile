# Needs make and Python 3.11 or newer, nothing else: `make demo`, `make test`.

PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
# The stamps make a second `make` instant; the editable install sees source changes without them.
USE := $(VENV)/.use-stamp
DEV := $(VENV)/.dev-stamp
RAY := .venv-ray
ENGINES := .venv-engines
ENGINE_TESTS := vllm==0.33.0 vllm==0.22.0 sglang==0.5.23
# what vLLM and SGLang import on the way to their MoE kernels; the rest of what they depend on is for GPUs
ENGINE_NEEDS := transformers requests pyzmq msgspec cloudpickle regex cbor2 psutil aiohttp openai openai-harmony pillow \
	pybase64 cachetools uvloop py-cpuinfo prometheus-client xgrammar fastapi partial-json-parser llguidance einops gguf \
	orjson ipython dill sentencepiece setuptools compressed-tensors
DEMO_MODEL := examples/models/qwen3-30b-a3b.json
SANITIZED := one_of_each or every_case_on_a_gpu or every_candidate_on_every_case or follow_their_routing
DEMO_DB := .demo/moecache.sqlite

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint types docs docs-check prebuilt sweep cdna ray sanitize engines install-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(DEV) ## create .venv with everything that development needs

demo: $(USE) ## tune a real model's sorting on this machine, then show what was kept and why
	$(BIN)/moecache warm $(DEMO_MODEL) --tokens 1,16,256,4096 --routing uniform --db $(DEMO_DB)
	$(BIN)/moecache ls --db $(DEMO_DB)
	$(BIN)/moecache explain $(DEMO_MODEL) --db $(DEMO_DB)

test: lint types docs-check ## lint, types, documentation and tests; what CI runs
	@command -v cc >/dev/null || echo "no cc: the tests leave out what executes the kernels for CDNA"
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(DEV) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV) ## mypy, strict
	$(BIN)/mypy -p moecache

docs: $(DEV) ## write the generated parts of the documentation anew
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_api.py
	$(BIN)/python docs/make_tables.py
	$(BIN)/python docs/make_picture.py

docs-check: $(DEV) ## fail when a generated part of the documentation is stale
	$(BIN)/python docs/make_cli.py --check
	$(BIN)/python docs/make_api.py --check
	$(BIN)/python docs/make_tables.py --check
	$(BIN)/python docs/make_picture.py --check
	$(BIN)/python docs/make_cdna.py --check

prebuilt: $(DEV) ## predict anew what ships for GPUs that nobody measured; after every change of a kernel
	$(BIN)/python benchmarks/prebuilt.py predict

sweep: $(DEV) ## compile all that the tests draw a few of; an hour
	SWEEP=1 $(BIN)/python -m pytest -n $(WORKERS) -k compile

cdna: $(DEV) ## compile every GPU candidate for gfx942 and gfx950 and write docs/cdna.md; minutes
	$(BIN)/python docs/make_cdna.py

ray: ## test `moecache warm --ray` with a Ray cluster of this machine, without a GPU
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt \
		--editable '.[ray]' pytest hypothesis
	$(RAY)/bin/python -m pytest -q tests/test_fleet.py -p no:cacheprovider

sanitize: $(DEV) ## run one config of each variant under compute-sanitizer; needs an NVIDIA GPU and its toolkit
	compute-sanitizer --target-processes application-only --error-exitcode 1 $(BIN)/python -m pytest -m gpu -q \
		tests/test_moe_gpu.py tests/test_fused_moe_fp8_gpu.py tests/test_sort_gpu.py tests/test_alternatives.py \
		-k "$(SANITIZED)"

engines: ## test the plugins with the real vLLM (two versions) and SGLang, without a GPU; downloads gigabytes
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt \
		--editable . triton pytest hypothesis $(ENGINE_NEEDS)
	for engine in $(ENGINE_TESTS); do \
		test -d $(ENGINES)/$$engine || $(ENGINES)/bin/python -m pip install -qq --disable-pip-version-check --no-deps \
			--target $(ENGINES)/$$engine $$engine $$(case $$engine in sglang*) echo torchvision==0.28.0;; esac) || exit 1; \
		PYTHONPATH=$(ENGINES)/$$engine $(ENGINES)/bin/python -m pytest -q tests/engines -p no:cacheprovider || exit 1; \
	done

install-check: ## install into a fresh environment and tune there, outside the working tree
	rm -rf build && mkdir -p build/source
	cp -R pyproject.toml README.md LICENSE src moecache backends kernels schemas build/source
	$(PYTHON) -m venv build/install-check
	build/install-check/bin/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt build/source
	cd build && install-check/bin/moecache warm ../$(DEMO_MODEL) --tokens 16 --db check.sqlite
	cd build && install-check/bin/python -m moecache ls --db check.sqlite
	rm -rf build

clean: ## remove what these targets made
	rm -rf $(VENV) $(RAY) $(ENGINES) .demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(USE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moecache needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): torch is large, the first time takes minutes"
	$(INSTALL) --editable .
	@touch $@

$(DEV): $(USE)
	$(INSTALL) --editable '.[dev]'
	@touch $@
