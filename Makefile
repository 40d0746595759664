PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two cores share the work of most of these best when each process keeps to one thread.
export OMP_NUM_THREADS ?= 1
TINY := --limit 60 --limit-test 40 --batch-size 20 --epochs 1 --seeds 0

.PHONY: help setup demo test lint format types unit docs package examples coverage benchmark oldest \
    mutation mutation-kit clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(VENV)/installed  ## make the virtual environment and install everything into it

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: setup  ## train C2BIN, SimCLR, MoCo v2 and BYOL side by side and compare them
	OMP_NUM_THREADS=2 $(BIN)/python examples/demo.py

test: lint  ## everything that has to hold; the unit tests run every example
	$(MAKE) --jobs 2 types docs package  # each of them is busy on one core
	$(MAKE) unit

format: setup  ## bring the code into the form that lint asks for
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## of the package, the adapters, the examples and the tests
	$(BIN)/mypy

# Files in order: those of few and long tests come first, so that both processes end together.
unit: setup  ## doctests, unit, property, two-process and adapter tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

docs: setup  ## build the site into site/, warnings are errors
	rm -rf site
	$(BIN)/python -m sphinx -q -W --keep-going -n -b html docs site

package: setup  ## build the wheel and check it
	rm -rf build/dist
	$(BIN)/python -m build --outdir build/dist .
	$(BIN)/twine check --strict build/dist/*

examples: setup  ## every example by its command, at a size that only shows that it runs
	$(BIN)/python examples/plain_pytorch.py --steps 20
	$(BIN)/python examples/check_a_loss.py
	$(BIN)/python examples/add_clusters_to_your_method.py --steps 20
	$(BIN)/python examples/lightly_module.py --epochs 2
	$(BIN)/python -m torch.distributed.run --nproc_per_node 2 examples/two_ranks.py
	$(BIN)/python examples/micro_batches.py
	$(BIN)/python examples/cluster_features.py --epochs 5
	$(BIN)/python examples/benchmarks/loss_cost.py --rounds 3 --seconds 0
	$(BIN)/python examples/benchmarks/distributed_cost.py --rounds 3
	$(BIN)/python examples/benchmarks/step_cost.py --host lightly --batch-size 4 --rounds 1
	$(BIN)/python examples/pipeline_cost.py --batch-size 4 --images 16 --seconds 0
	$(BIN)/python examples/demo.py --smoke --out build/demo --overwrite
	$(BIN)/python examples/paper.py all --budget smoke --out build/paper
	$(BIN)/python examples/study.py --methods c2bin --trials 1 --rungs 1 $(TINY) --out build/study
	$(BIN)/python examples/decisions.py --only default $(TINY) --out build/decisions
	$(BIN)/python examples/gradient_sizes.py $(TINY) --out build/gradients
	$(BIN)/python examples/learning_curves.py $(TINY) --tensor-views --out build/curves

coverage: setup  ## lines and branches of the core that its tests run, with a floor
	$(BIN)/python -m pytest tests/test_*.py tests/testing --ignore tests/test_docs.py \
	    --numprocesses 2 --dist loadfile \
	    --cov c2bin_ext --cov-branch --cov-report term-missing:skip-covered --cov-fail-under 98.5

benchmark: setup  ## cost of the losses, of a training step, and over processes
	$(BIN)/python examples/benchmarks/loss_cost.py --out docs/results
	$(BIN)/python examples/benchmarks/distributed_cost.py --out docs/results
	$(BIN)/python examples/benchmarks/step_cost.py --host lightly --out docs/results
	$(BIN)/python examples/pipeline_cost.py --batch-size 64 --out docs/results

OLDEST_VENV := .venv-oldest
OLDEST_TORCH := $(shell sed -n 's/^dependencies = \["torch>=\(.*\)"\]/\1/p' pyproject.toml)
OLDEST_PYTHON ?= $(PYTHON)

oldest: $(OLDEST_VENV)/installed  ## the core's tests with the oldest torch that is promised (downloads 2.5 GB)
	$(OLDEST_VENV)/bin/python -m pytest -rs $(filter-out tests/test_docs.py,$(wildcard tests/test_*.py))

# That torch was built against numpy 1.
$(OLDEST_VENV)/installed: pyproject.toml
	$(OLDEST_PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet 'torch==$(OLDEST_TORCH).*' 'numpy<2' \
	    -e '.[eval,testing]' pytest pytest-timeout
	@touch $@

mutation: setup  ## mutation testing of the core with the fast tests (minutes to an hour)
	$(BIN)/python -m pip install --quiet 'mutmut>=3.8'
	HYPOTHESIS_PROFILE=mutation $(BIN)/mutmut run
	$(BIN)/mutmut results

KIT := build/mutation-kit

mutation-kit: setup  ## the same of the testing kit (one to two hours)
	$(BIN)/python -m pip install --quiet 'mutmut>=3.8'
	mkdir -p $(KIT)
	cp -r README.md c2bin_ext docs examples integrations tests $(KIT)
	sed 's/^\[tool.mutmut\]/[tool.mutmut-core]/; s/^\[tool.mutmut-kit\]/[tool.mutmut]/' \
	    pyproject.toml > $(KIT)/pyproject.toml
	cd $(KIT) && HYPOTHESIS_PROFILE=mutation $(abspath $(BIN))/mutmut run
	cd $(KIT) && $(abspath $(BIN))/mutmut results

clean:  ## remove what the other targets made
	rm -rf $(VENV) $(OLDEST_VENV) build mutants site
