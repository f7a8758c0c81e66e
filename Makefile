PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH ?= -r .ci/requirements.txt
WORKERS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all lint bench bench-check format clean

demo: $(READY)
	@echo "demo: embedding real questions and passages with all-MiniLM-L6-v2"
	@$(BIN)/python bench/demo.py

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
	run server $(if $(INFINITY),--infinity $(INFINITY))
	@PYTHONPATH=tests $(BIN)/python -m pytest -q bench/ops.py
	@$(BIN)/python -m pytest -q tests/test_encoder.py tests/test_family_*.py --families bench/results/families.json
	@$(BIN)/python bench/report.py bench/results --page docs/benchmarks.md --readme README.md

bench-check: $(READY)
	@echo "bench-check: speedups over baselines, compared with those stored for this machine (3 minutes)"
	@PYTHONPATH=tests $(BIN)/python bench/check.py

format: $(READY)
	@echo "format: ruff check --fix, ruff format"
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	@echo "clean: removing $(VENV), caches and outputs"
	@rm -rf $(VENV) .coverage demo-output dist build .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch is installed first, so that only it uses PyTorch's own index. On a GPU machine: make TORCH=torch test
$(READY): pyproject.toml .ci/requirements.txt
	@echo "install: $(VENV) with $(PYTHON): torch, then unpadded (takes a few minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --no-deps $(TORCH)
	@$(BIN)/python -m pip install --quiet --editable ".[test,bench,lint]"
	@touch $@
