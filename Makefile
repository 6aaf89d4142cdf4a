# demo, test, lint and bench make the environment first, from nothing but Python ≥ 3.11, again when pyproject.toml changes.
PYTHON ?= python3
RESULTS ?= runs/gpu
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints/cpu.txt)

.PHONY: env demo test lint bench gpu

env: .venv/installed

.venv/installed: pyproject.toml constraints/cpu.txt
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	.venv/bin/pip install $(CONSTRAINTS) -e ".[demo,peft,trl,plot,dev]" && touch $@

demo: env
	.venv/bin/dpo-fast demo

test: env
	.venv/bin/pytest

lint: env
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

bench: env
	.venv/bin/python benchmarks/bench_train.py

# Uses the packages that PYTHON has. They may not include this one, and the repository root must stay off sys.path.
gpu: build/gpu-path
	PYTHONPATH=$(CURDIR)/build/gpu-path $(PYTHON) -P -m pytest -m gpu
	PYTHONPATH=$(CURDIR)/build/gpu-path $(PYTHON) benchmarks/bench_layout.py --out $(RESULTS)

build/gpu-path:
	mkdir -p $@ && ln -s $(CURDIR)/dpo_fast $(CURDIR)/kernels/dpo_fast_kernels $@
