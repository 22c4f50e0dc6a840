# make run | test | test-full | check | test-gpu | bench | tune | goldens | matrix | releases | docs | documented | clean
#
# By default everything happens in .venv, made from constraints.txt on first use.
# With PYTHON=... on the command line nothing is installed: that interpreter is used as it is, with this checkout on its path.
#   make run TORCH_INDEX=URL        takes PyTorch from one more package index (its CPU wheels, say)
#   make run ARGS="--model mixtral" passes arguments to what is run

ARGS ?=
TORCH_INDEX ?=
TORCH_VERSIONS ?= 2.11.0 2.13.0 2.14.1
TRANSFORMERS_VERSIONS ?= 4.36.2 4.45.2 4.51.3 4.57.6

ifeq ($(origin PYTHON),command line)
  RUN := PYTHONPATH=$(CURDIR) $(PYTHON)
  TO_RUN :=
  TO_TEST :=
else
  BASE_PYTHON := $(firstword $(foreach name,python3.11 python3.12 python3,$(shell command -v $(name))))
  RUN := .venv/bin/python
  TO_RUN := .venv/.examples
  TO_TEST := .venv/.dev
endif
PIP_INSTALL = -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# Threads that spin while they wait for each other make small matrix products many times slower on a busy machine.
run bench: export OMP_WAIT_POLICY = passive
test test-full test-gpu goldens matrix releases: export OMP_NUM_THREADS = 1

.PHONY: run test test-full check format lint types layers spelling generated test-gpu bench tune goldens matrix releases docs documented clean

run: $(TO_RUN)
	$(RUN) examples/quickstart.py $(ARGS)

test: $(TO_TEST)
	$(RUN) -m pytest -n 2 --dist worksteal -m "not gpu and not slow" $(ARGS)

test-full: $(TO_TEST)
	$(RUN) -m pytest -n 2 --dist worksteal -m "not gpu" $(ARGS)

test-gpu: $(TO_TEST)
	$(RUN) -m pytest -m gpu $(ARGS)

check: format lint types layers spelling generated

format: $(TO_TEST)
	$(RUN) -m ruff format --check .

lint: $(TO_TEST)
	$(RUN) -m ruff check .

types: $(TO_TEST)
	$(RUN) -m pyright --pythonpath $$($(RUN) -c "import sys; print(sys.executable)")

layers: $(TO_TEST)
	$(RUN) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"

spelling: $(TO_TEST)
	$(RUN) -m codespell_lib

generated: $(TO_TEST)
	$(RUN) -m docs.generate --check

bench: $(TO_TEST)
	$(RUN) -m benchmarks.kernels $(ARGS)
	$(RUN) -m benchmarks.training_step $(ARGS)
	$(RUN) -m benchmarks.decode
	$(RUN) -m benchmarks.models $(ARGS)

# Rewrites the configurations of the kernels for the GPU that is here; ARGS="D E2" takes these shapes alone.
tune: $(TO_TEST)
	$(RUN) -m benchmarks.tune --write $(ARGS)

# Rewrites the expected graphs inside the tests; read the diff before committing it.
goldens: $(TO_TEST)
	EXPECTTEST_ACCEPT=1 $(RUN) -m pytest -q -m "not gpu" -k golden $(ARGS)

# Writes the generated pages, then builds build/site.
docs: $(TO_TEST)
	$(RUN) -m docs.generate
	$(RUN) -m mkdocs build --strict

# What the documentation says, from an installed package in a new environment.
documented: $(TO_TEST)
	$(RUN) -m tests.clean_environment $(ARGS)

# The tests under each supported PyTorch, in an environment of its own; downloads gigabytes.
matrix: $(addprefix .venv/matrix/,$(TORCH_VERSIONS))

.venv/matrix/%: FORCE
	$(BASE_PYTHON) -m venv --clear $@
	grep -v -E '^(torch|triton)==' constraints.txt > $@/constraints.txt
	$@/bin/python -m pip install --quiet --constraint $@/constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	    torch==$* -e ".[dev]"
	$@/bin/python -m pytest -m "not gpu" $(ARGS)

# What becomes of every model with experts in older releases of transformers: one table each.
releases: $(addprefix .venv/transformers/,$(TRANSFORMERS_VERSIONS))

# An environment which holds that release and what it needs, over the packages of the one that tests run in.
.venv/transformers/%: $(TO_TEST) FORCE
	$(RUN) -m venv --clear $@
	$(RUN) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$(echo $@/lib/python*/site-packages)/below.pth
	$@/bin/python -m pip install --quiet transformers==$*
	PYTHONPATH=$(CURDIR) $@/bin/python -m tests.models.survey $(ARGS)

FORCE:

.venv/bin/python:
	$(BASE_PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'scatter-moe needs Python 3.11 or newer')"
	$(BASE_PYTHON) -m venv .venv

.venv/.%: pyproject.toml constraints.txt | .venv/bin/python
	.venv/bin/python $(PIP_INSTALL) --editable ".[$*]"
	touch $@

clean:
	rm -rf .venv build dist runs *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
