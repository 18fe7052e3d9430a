# make setup   an environment in .venv, installed from the tested set under constraints/
# make demo    the main job, small: GRPO on phantoms; leaves runs/demo/report/index.html; sets up first
# make test    what must pass before a change goes in; sets up first
.DEFAULT_GOAL := help
.PHONY: help setup demo serve lint lint-types lint-rest test test-cluster test-rest test-slow slow-cluster slow-rest chaos fuzz \
	test-gpu check-gpu-install clean

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV := .venv
STAMP := $(VENV)/.setup-stamp
# cpu or gpu: which extra of pyproject.toml, and which file of constraints/, is installed; by default the one that is.
# Read at once, so that `make clean setup` installs the same again.
ifeq ($(origin EXTRA),undefined)
EXTRA := $(or $(shell cat $(STAMP) 2>/dev/null),cpu)
endif
# URL of a package index with builds of torch for EXTRA, where the default index has none (see torch's install page)
TORCH_INDEX ?=
# of `make fuzz`
SEED ?= 0
# of `make test-gpu`: learner, engine, segmenter, pipeline or two_gpus; nothing for all
PART ?=
# overrides of the demo's configuration, such as "name=demo2 seed=1"
DEMO ?=

BIN := $(VENV)/bin
PACKAGES := umrg rewards phantoms reasoner learner actors cluster serving
CHECKED := $(PACKAGES) $(wildcard bench/*.py deploy/*.py docs/*.py models/*.py) tests
PIP := DS_BUILD_OPS=0 $(BIN)/pip --disable-pip-version-check -qq install -c constraints/$(EXTRA).txt
# `==2.13.0` would take a CPU build too, and prefers it where an index has both; `===` compares the whole version.
TORCH := torch$(if $(filter cpu,$(EXTRA)),==2.13.0+cpu,$(if $(TORCH_INDEX),==2.13.0,===2.13.0)) torchvision==0.28.0

help: ## these lines
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo "variables: PYTHON=$(PYTHON) EXTRA=cpu|gpu TORCH_INDEX=URL"

setup: $(STAMP) ## install everything into .venv (a second call does nothing)
# Earlier set-ups, of the CPU set, left an empty file.
	@case "$$(cat $(STAMP))" in ""|$(EXTRA)) ;; *) echo "error: $(VENV) holds the other set; run make clean setup" \
		"EXTRA=$(EXTRA)"; exit 2; esac

$(STAMP): pyproject.toml $(wildcard constraints/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
		|| { echo "error: $(PYTHON) is not Python 3.11 or 3.12; run make setup PYTHON=python3.11"; exit 2; }
	@echo "[1/5] $(PYTHON) -m venv $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[2/5] build tools"
	@$(PIP) setuptools wheel
	@echo "[3/5] $(TORCH)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH) \
		|| { echo "error: this package index lacks $(TORCH); run make setup EXTRA=$(EXTRA) TORCH_INDEX=URL with the" \
		"URL of torch's builds for $(if $(filter cpu,$(EXTRA)),CPU,CUDA 13.0) from its install page"; exit 2; }
	@echo "[4/5] medreasoner with vLLM, Ray, DeepSpeed and the tools: some $(if $(filter cpu,$(EXTRA)),3,10) GB, a few minutes"
	@$(PIP) --no-build-isolation -e '.[$(EXTRA),dev]'
	@echo "[5/5] what this build of torch cannot load"
# vLLM and transformers use these two for sound and video only, but import whatever is there: CUDA builds
# fail beside CPU torch, and nothing here hears or films. Beside CUDA torch all three import, and nothing is changed.
	@for package in torchaudio torchcodec; do \
		$(BIN)/python -c "import $$package" 2>/dev/null || $(BIN)/pip -q uninstall -y $$package; done
	@$(BIN)/python -m cluster.commands.torchvision_shim
	@echo $(EXTRA) > $@
	@echo "ready: $(BIN)/medreasoner doctor"

demo: setup ## train the tiny reasoner with GRPO on phantoms: about six minutes, set-up not counted; DEMO="key=value …" changes its config
	$(BIN)/medreasoner train configs/$(if $(filter gpu,$(EXTRA)),demo_gpu,demo).yaml $(DEMO)

serve: setup ## the bundled tiny model over HTTP at http://127.0.0.1:8000, until Ctrl-C; SERVE="MODEL key=value …" serves another
	$(BIN)/medreasoner serve $(SERVE)

lint: setup ## ruff, mypy --strict, and the floors (import-linter)
	@$(MAKE) --no-print-directory -j2 lint-types lint-rest

lint-types:
	$(BIN)/mypy $(CHECKED)

lint-rest:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

# In two processes: what uses the cluster that tests share, or starts large ones, one test after another, because two of
# these at a time do not fit into 24 GiB; and everything else. Of the slow tests the other process has small clusters too,
# one at a time and with one engine at most.
PYTEST := $(BIN)/pytest --durations 20 -m

test: lint ## lint, then every test that is not slow
	@$(MAKE) --no-print-directory -j2 test-cluster test-rest

test-cluster:
	$(PYTEST) "not slow and not gpu and cluster"

test-rest:
	$(PYTEST) "not slow and not gpu and not cluster"

test-slow: setup ## the slow tests: engines and training; the GPU tests as a rehearsal
	@$(MAKE) --no-print-directory -j2 slow-cluster slow-rest

slow-cluster:
	$(PYTEST) "slow and not gpu and cluster and not chaos"

slow-rest:
	$(PYTEST) "slow and not gpu and not cluster and not chaos"
	$(PYTEST) gpu tests/gpu

chaos: setup ## what of the slow tests would not fit into half an hour: the same on a larger scale or in further cases
	$(PYTEST) chaos

fuzz: setup ## damaged files, texts and requests at random, and the property tests with examples of their own choice
	$(BIN)/python -m tests.fuzz --count 3000 --seed $(SEED)
	MEDREASONER_HYPOTHESIS=fuzz $(PYTEST) "not slow and not gpu" tests/umrg tests/rewards tests/serving/test_consensus.py \
		tests/serving/test_schema.py

test-gpu: setup ## what only a GPU can show, or, without one, a rehearsal; PART=learner (engine, segmenter, pipeline, two_gpus) runs one part
	$(PYTEST) gpu tests/gpu$(if $(PART),/test_$(PART).py)

# It stays if a step fails, and the next call begins where this one ended.
check-gpu-install: ## install the GPU set into .venv-gpu, import everything there, remove it: needs no GPU, but 10 GB of disk
	@$(MAKE) --no-print-directory setup EXTRA=gpu VENV=.venv-gpu
	.venv-gpu/bin/python -m tests.gpu_install
	rm -rf .venv-gpu

clean: ## remove .venv and every cache
	rm -rf .venv .venv-gpu build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
