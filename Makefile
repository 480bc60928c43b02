# Two commands: `make demo` grows a chat model from nothing, `make test` passes the tests. Both make their own virtual
# environment first. torch goes in before everything else, and a constraint keeps whatever follows from replacing it.
#
# pip's own settings are respected (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf): where an index offers a CPU-only
# build of the same version, pip prefers it. TORCH=... chooses another build: make demo TORCH=torch==2.13.0+cpu

TORCH ?= torch==2.13.0
LLAMA ?= llama-cpp-python==0.3.36
VENV  ?= .venv
ARGS  ?=
BIN   := $(VENV)/bin
PIP   := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq --no-input
LIMIT := $(VENV)/constraints.txt
READY := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help demo studio serve test browser bench bench-llamacpp parity-llamacpp clean env

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: env  ## grow a chat model from nothing on embedded data (ARGS="--help" for its options)
	@$(BIN)/mindseed demo $(ARGS)

studio: $(VENV)/.ui  ## the studio in the browser, with the models and runs under runs/ (ARGS="--help" for its options)
	@$(BIN)/mindseed ui $(ARGS)

serve: $(VENV)/.ui  ## a model behind OpenAI's API (ARGS="runs/demo/fine-tune/model"; "--help" for its options)
	@$(BIN)/mindseed serve $(or $(ARGS),runs/demo/fine-tune/model)

test: $(VENV)/.test  ## the whole test suite (ARGS="-m parity" for a part of it)
	@$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(VENV)/.bench  ## measure the figures of docs/BENCHMARKS.md on this machine
	@$(BIN)/python -m benchmarks $(ARGS)

parity-llamacpp: $(VENV)/.test $(VENV)/.llamacpp  ## our GGUF files in llama.cpp itself (ARGS=qwen3 for some)
	@$(BIN)/python -m tests.parity_llamacpp $(VENV)/llamacpp/bin/python $(ARGS)

bench-llamacpp: $(VENV)/.bench $(VENV)/.llamacpp  ## decoding speed against llama.cpp, which is compiled first
	@$(BIN)/python -m benchmarks.llamacpp $(VENV)/llamacpp/bin/python

# The studio's tests drive a real browser. Without one they are skipped and say so; this never fails because of it.
browser:  ## Debian's chromium for the studio's tests, if there is none and this is root
	@if ! command -v chromium >/dev/null 2>&1 && ! command -v chromium-browser >/dev/null 2>&1 \
	    && ! command -v google-chrome >/dev/null 2>&1; then \
	    if command -v apt-get >/dev/null 2>&1 && [ "$$(id -u)" = 0 ]; then \
	        echo "[+] chromium, a browser for the studio's tests"; \
	        export DEBIAN_FRONTEND=noninteractive; quick="-qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20"; \
	        { timeout 120 apt-get $$quick update; timeout 600 apt-get $$quick -y --no-install-recommends install chromium; \
	        } >/dev/null 2>&1 </dev/null || echo "chromium could not be installed"; \
	    else echo "no chromium was found, and only root can install Debian's"; fi; \
	fi

clean:  ## remove the environment and caches; runs/ stays
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

env: $(VENV)/.core  ## only the virtual environment

# Each stamp is written last, so a broken installation is taken up again by the next call.
$(VENV)/.torch: Makefile
	@python=; for p in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
	    if $$p -c '$(READY)' >/dev/null 2>&1; then python=$$p; break; fi; done; \
	if [ -z "$$python" ]; then \
	    echo "error: no Python 3.11 or newer (with venv) was found; install one or name it: make PYTHON=/path/to/python" >&2; \
	    exit 2; fi; \
	echo "[1/3] virtual environment in $(VENV), $$($$python --version)"; \
	$$python -m venv $(VENV)
	@echo "[2/3] $(TORCH) (the large download)"
	@$(PIP) "$(TORCH)"
	@$(BIN)/python -c 'from importlib.metadata import version as v; print("torch==" + v("torch"))' > $(LIMIT)
	@touch $@

$(VENV)/.core: $(VENV)/.torch pyproject.toml
	@echo "[3/3] mindseed and its libraries"
	@$(PIP) --constraint $(LIMIT) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	@echo "[+] what the tests need: pytest and xdist, hypothesis, transformers, pyarrow, zstandard, the server and its clients, the studio"
	@$(PIP) --constraint $(LIMIT) --editable ".[test,parity,parquet,zstd,serve,ui]"
	@touch $@

$(VENV)/.ui: $(VENV)/.core
	@echo "[+] what the studio needs: streamlit, the server"
	@$(PIP) --constraint $(LIMIT) --editable ".[ui]"
	@touch $@

$(VENV)/.bench: $(VENV)/.core
	@echo "[+] what the benchmarks need: transformers, matplotlib, the server"
	@$(PIP) --constraint $(LIMIT) --editable ".[bench,parquet,zstd,serve]"
	@touch $@

# In an environment of its own, so that the tests' is what `pip install mindseed` gives. Needs a C++ compiler.
$(VENV)/.llamacpp: $(VENV)/.core
	@echo "[+] $(LLAMA), compiled here: ten minutes on two cores (CMAKE_BUILD_PARALLEL_LEVEL sets how many it uses)"
	@$(BIN)/python -m venv $(VENV)/llamacpp
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(VENV)/llamacpp/bin/python -m pip install -qq --no-input "$(LLAMA)"
	@touch $@
