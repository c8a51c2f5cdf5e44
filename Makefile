# make repro: install, start the local services, run the whole pipeline, say where to look.   make help: the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install install-test check-system repro study libero libero-table test quick check-long gpu lint format docs up down status ui deploy worker pin-images clean-workspace

PRESET ?=
VENV := .venv
# The first interpreter that really runs and is new enough (a pyenv shim may exist and refuse to run).
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& { echo $$p; break; }; done)
# Silent tools get a line every ten seconds; output passes through unchanged.
BEAT := $(if $(PYTHON),$(PYTHON),python3) infra/local/heartbeat.py
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1
export DO_NOT_TRACK := 1
# A shell for robots (ROS) puts packages of another Python before ours, with plugins that pytest would load.
unexport PYTHONPATH
unexport PYTHONDONTWRITEBYTECODE
# Servers on this machine are never asked through a proxy.
export NO_PROXY := $(or $(no_proxy),$(NO_PROXY),localhost),127.0.0.1,localhost,::1
export no_proxy := $(NO_PROXY)

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18
	@echo 'PRESET=smoke (or another file of presets/) runs repro in workspaces/PRESET/ instead of here.'

$(VENV)/bin/python:
	@test -n '$(PYTHON)' || { echo 'Python: no python3.11 or python3.12 found; install one (sudo apt-get install python3.11 python3.11-venv) or set PYTHON=/path/to/python' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo '$(PYTHON): has no venv module; sudo apt-get install $(notdir $(PYTHON))-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

check-system: ## are the system libraries for rendering there
	@test -n '$(PYTHON)' || { echo 'Python: no python3.11 or python3.12 found; install one (sudo apt-get install python3.11 python3.11-venv) or set PYTHON=/path/to/python' >&2; exit 1; }
	@$(PYTHON) infra/local/system.py

# torch first and alone, by pip: its wheel differs from machine to machine (CPU, CUDA), so constraints.txt does not hold it.
# The others by uv, which takes 11 s where pip takes a minute. It does not read pip's configuration; a mirror is passed on.
# --no-compile, as uv does: most of the packages' modules are never imported, and Python compiles the others then.
UV = UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$${PIP_INDEX_URL:-$$($(VENV)/bin/python -m pip config get global.index-url 2>/dev/null)}}" \
	$(BEAT) 'uv pip install $(1)' -- $(VENV)/bin/uv pip install --python $(VENV) -c constraints.txt
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@$(BEAT) 'pip install torch' -- $(VENV)/bin/python -m pip install --no-compile -c constraints.txt uv 'torch==2.13.0'
	@$(call UV,wav) -e '.[all]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed-libero
	@$(call UV,wav[test]) -e '.[test]'
	@touch $@

install: check-system $(VENV)/.installed ## the environment in .venv

install-test: check-system $(VENV)/.installed-test ## what tests, lint and pytest by hand need as well

.PHONY: check-preset
check-preset:
	@test -z '$(PRESET)' || { test -z '$(findstring /,$(PRESET))' && test -f 'presets/$(PRESET).yaml'; } || { echo "PRESET = '$(PRESET)': no such file in presets/; there are: $(patsubst presets/%.yaml,%,$(wildcard presets/*.yaml))" >&2; exit 1; }

.PHONY: check-git
check-git:
	@git rev-parse --git-dir >/dev/null 2>&1 || { echo 'git: this folder is no repository, which dvc needs: git init && git add -A && git commit -qm start' >&2; exit 1; }

repro: check-preset $(if $(PRESET),,check-git) install up ## the whole pipeline; PRESET=name: in workspaces/name with presets/name.yaml
ifeq ($(PRESET),)
	@$(BEAT) 'dvc repro' -- dvc repro
	@python -m wav.local.services where .
else
	@$(BEAT) 'dvc repro' -- wav repro --preset $(PRESET)
	@python -m wav.local.services where workspaces/$(PRESET)
endif

# ARGS="--dry", "workspaces/NAME --axes score K --episodes 25", ...: docs/planning-study.md
study: install up ## the planning study of a trained workspace: resumable, states its hours; ARGS=--dry: the cells
	@python -m benchmarks.studies.planning $(ARGS)

# hf-libero without its dependencies: they would replace torch by a CUDA build whose torchvision does not import here.
$(VENV)/.installed-libero: $(VENV)/.installed
	@$(call UV,wav[libero]) -e '.[libero]'
	@$(call UV,hf-libero) --no-deps 'hf-libero==0.1.4'
	@touch $@

libero: check-system $(VENV)/.installed-libero ## LIBERO's simulator; then: wav render libero_spatial

# EXPORT=folder (default: export), SUITES="libero_spatial ..." (all four), EPISODES=per task (50), ARGS=further options
libero-table: $(VENV)/.installed-libero ## an export over LIBERO's four suites, beside the published figures
	@wav libero-table $(or $(EXPORT),export) $(addprefix --suite ,$(SUITES)) --episodes $(or $(EPISODES),50) $(ARGS)

# One thread per process of tests, a file of tests in one process. JOBS=n: another number of processes.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: check-system $(VENV)/.installed-test ## what the tests need, then the tests (with the smoke pipeline)
	@$(BEAT) 'pytest' -- env $(PYTEST) -m 'not long'

quick: $(VENV)/.installed-test ## unit tests and the golden losses: no simulator, server, training or other program
	@env $(PYTEST) -m 'not long and not smoke and not simulator and not services and not integration'

# TESTS="tests/fuzz -k 0-500": some of them. RESUME=1: without what passed at this commit, as the record says.
check-long: check-system $(VENV)/.installed-test ## the slow checks; KILLS=n: n chains of kills, SEED=n: other generated cases
	@$(BEAT) 'pytest' -- python -m pytest -m long --record benchmarks/results/check-long.json --seed $(or $(SEED),0) \
		$(if $(RESUME),--resume) $(TESTS)

# Needs torch, diffusers, safetensors and numpy, and no install: any Python that has them does (PYTHON=...).
# ARGS="--part plan", "--trial" (tiny sizes on a CPU), ...: benchmarks/gpu.py --help
gpu: ## everything measured and checked on a CUDA GPU, in fifteen minutes; ARGS=--trial: the parts themselves, on a CPU
	@$(or $(wildcard $(VENV)/bin/python),$(PYTHON),python3) benchmarks/gpu.py $(if $(findstring --trial,$(ARGS)),,--json benchmarks/results/gpu.json) $(ARGS)

lint: $(VENV)/.installed-test ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy

format: $(VENV)/.installed-test ## let ruff rewrite
	ruff check --fix .
	ruff format .

$(VENV)/.installed-docs: $(VENV)/.installed
	@$(call UV,wav[docs]) -e '.[docs]'
	@touch $@

docs: $(VENV)/.installed-docs ## the docs site in site/: links checked, whole without a network (open site/index.html)
	@NO_MKDOCS_2_WARNING=1 mkdocs build --strict

up: $(VENV)/.installed ## local Prefect and S3 servers on 127.0.0.1 (idempotent)
	@python -m wav.local.services up

down: ## stop them (data stays in .local)
	@test ! -x $(VENV)/bin/python || python -m wav.local.services down

status: $(VENV)/.installed ## what runs
	@python -m wav.local.services status

ui: $(VENV)/.installed ## open Prefect's UI and say how to sign in
	@python -m wav.local.services ui

deploy: $(VENV)/.installed ## work pool, queue, automation and deployments on the Prefect server (idempotent)
	@$(BEAT) 'deploy' -- python -m infra.deploy

worker: $(VENV)/.installed ## run deployments here until Ctrl-C (infra/systemd/ for a server)
	@echo 'worker: starting; Ctrl-C ends it and its runs'
	@python -m infra.deploy worker

IMAGE_FILES := infra/docker/Dockerfile infra/docker/compose.yaml infra/kubernetes/services.yaml
pin-images: ## write the digests that the base images' tags have today into infra (needs docker with buildx)
	@for image in $$(sed -nE 's/^(FROM| +image:) ([a-z]+:[^@ ]+)(@.*)?$$/\2/p' $(IMAGE_FILES) | grep -v '^wav-' | sort -u); do \
		digest=$$(docker buildx imagetools inspect "$$image" | sed -nE 's/^Digest: +(sha256:[0-9a-f]{64})$$/\1/p'); \
		test -n "$$digest" || { echo "$$image: docker named no digest" >&2; exit 1; }; \
		sed -i -E "s#((FROM|image:) $$image)(@.*)?\$$#\1@$$digest#" $(IMAGE_FILES); echo "$$image@$$digest"; done

clean-workspace: check-preset ## delete workspaces/PRESET
	@test -n '$(PRESET)' || { echo 'PRESET: not set; make clean-workspace PRESET=smoke' >&2; exit 1; }
	rm -rf workspaces/$(PRESET)
