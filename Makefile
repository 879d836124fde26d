# make env | demo | test | lint | golden | docs | clean. Everything happens in .venv; `make env` alone prepares it.
PYTHON ?= python3
# Where no GPU is present this torch is installed first, so that pip does not take a build with several GB of CUDA libraries.
# Set TORCH (and PIP_INDEX_URL or PIP_EXTRA_INDEX_URL) for another build.
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
EXTRAS ?= test,video,audio,pdf,parquet,hub,milvus,ray
BIN := .venv/bin
STAMP := .venv/.stamp
DOCS_STAMP := .venv/.stamp-docs

export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1

.PHONY: env demo test lint golden docs clean help

help:
	@echo "make env     prepare .venv"
	@echo "make demo    train clip on real pictures, examine it, search with it; writes demo/report.html (8 minutes)"
	@echo "make test    lint, types, floors and all tests (20 minutes)"
	@echo "make lint    the quick half of make test"
	@echo "make golden  rewrite the golden files on purpose"
	@echo "make docs    the documentation site, in site/"
	@echo "make clean   remove what the others made, .venv too"

env: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "polysense needs Python 3.11 or newer; say make env PYTHON=python3.x"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	if command -v nvidia-smi > /dev/null; then echo "a GPU is present: torch is left to pip"; \
	elif ! $(BIN)/python -c 'import torch' 2> /dev/null; then $(BIN)/pip install -q '$(TORCH)'; fi
	$(BIN)/pip install -q -e '.[$(EXTRAS)]'
	# timm, open_clip and DALL-E are references in parity tests only. They ask for torchvision, whose wheels would replace torch: hence --no-deps.
	$(BIN)/pip install -q --no-deps '$(TORCHVISION)' timm open_clip_torch DALL-E
	touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install -q -e '.[docs]'
	touch $@

demo: env
	env -u OMP_NUM_THREADS $(BIN)/python scripts/demo.py

lint: env
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -n $(or $(JOBS),2) --durations 5

golden: env
	$(BIN)/python -m tests.golden.refresh

docs: $(DOCS_STAMP)
	$(BIN)/python scripts/gen_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

clean:
	rm -rf .venv site demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
