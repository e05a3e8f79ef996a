# Each target sets up what it needs in .venv, once for each pyproject.toml.
PYTHON ?= python3
VENV := .venv
PROBLEMS := 10000
SECONDS := 480
OPTIONS :=
INSTALLED := $(VENV)/.installed
# The oldest releases that pyproject.toml allows; make test-oldest takes others: TORCH=2.11 TORCHVISION=0.26.
oldest = $(shell sed -nE 's/.*"$(1)>=([0-9.]+)".*/\1/p' pyproject.toml)
TORCH := $(call oldest,torch)
TORCHVISION := $(call oldest,torchvision)
OLDEST := build/torch-$(TORCH)

# Images of containers set it, and then every process would compile what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test yolo test-oldest campaign gpu evidence lint format docs package clean

demo: $(INSTALLED)
	$(VENV)/bin/awconv demo

test: $(INSTALLED)
	$(VENV)/bin/pytest -n auto --maxprocesses 4 --dist loadgroup

# Ultralytics is under AGPL-3.0, and so no dependency of any kind: this installs it into .venv and tests awconv with it.
yolo: $(INSTALLED)
	$(VENV)/bin/pip install --quiet --no-compile --no-deps ultralytics ultralytics-thop polars polars-runtime-32
	$(VENV)/bin/pytest -n auto --maxprocesses 2 tests/integrations tests/test_docs.py -k 'yolo or flop'

# The tests in another environment, with PyTorch of another release. Triton before 3.7 runs no kernel with NumPy 2.4,
# and peft takes no torchao that is old enough for such a PyTorch.
test-oldest:
	mkdir -p build
	printf '%s\n' 'torch==$(TORCH)' 'torchvision==$(TORCHVISION)' 'numpy<2.4' >$(OLDEST).txt
	PIP_CONSTRAINT='$(CURDIR)/$(OLDEST).txt' $(MAKE) $(OLDEST)/.installed VENV=$(OLDEST)
	$(OLDEST)/bin/pip uninstall --quiet --yes torchao
	$(MAKE) test VENV=$(OLDEST)

# Random problems, damaged inputs and slow cases, half an hour on 2 cores: with PROBLEMS=500, as many of the operator's.
campaign: $(INSTALLED)
	AWCONV_CAMPAIGN_PROBLEMS=$(PROBLEMS) $(VENV)/bin/python -m pytest -m campaign -n auto --maxprocesses 4 -p tests.ops.figures

# What it costs on this machine's GPU, and whether it is right there: at most SECONDS, results under build/gpu.
gpu:
	$(PYTHON) benchmarks/gpu.py --seconds $(SECONDS) $(OPTIONS)

# The full schedules of docs/experiments.md, on this machine's GPU: at most SECONDS, and again to go on.
evidence:
	$(PYTHON) benchmarks/evidence.py --seconds $(SECONDS) $(OPTIONS)

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/zizmor --offline --quiet .github

# The site, into build/site.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet
	@echo "The site is in build/site: python3 -m http.server --directory build/site"

# What is published, into build/dist: built, checked, and tried in a fresh environment.
package: $(INSTALLED)
	$(VENV)/bin/python tools/package.py

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build awconv-demo

# pip would compile all that it installs, a minute and 0.5 GB; Python compiles what is imported.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "awconv needs Python 3.10 or later, got $$($(PYTHON) --version); name one with make PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV): a few minutes and 6 GB, most of it PyTorch"
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/pip install --quiet --no-compile --editable '.[dev]'
	touch $@
