# Everything runs in a virtual environment of its own, pinned by constraints.txt.
PYTHON ?= python3.11
BIN := .venv/bin
# Two processes, which share the files out in their order: the long ones come first.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder
# Hundreds of processes load the same files: each would compile them anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install quickstart rlhf test-unit test test-rest test-families test-all lint check docs bench clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev,docs]'
	mkdir -p build/ns && ln -sfn ../.. build/ns/finray
	touch $@

# Fine-tune a small model for real: two workers, about two minutes on two cores.
quickstart: install
	$(BIN)/finray train recipes/quickstart/sft.yaml

# The chains on the same task: a start that can half do it, then DPO, and a reward model with GRPO.
rlhf: install
	$(BIN)/finray train recipes/quickstart/sft.yaml --set name=quickstart-start \
		--set optim.epochs=null --set optim.max_steps=12 --set eval.every_steps=null
	$(BIN)/finray train recipes/quickstart/dpo.yaml
	$(BIN)/finray train recipes/quickstart/reward.yaml
	$(BIN)/finray train recipes/quickstart/grpo.yaml

# While one works: no real command, no Ray, no test of seconds.
test-unit: install
	$(PYTEST) -m "not slow and not ray and not long" tests/unit

# What a change must pass.
test: install
	$(PYTEST) -m "not slow and not hosts and not families"

# The rest: long tests, several hosts on this machine, and a sample of the architectures.
# Three processes on two cores, as hosts that are killed or cut off are waited for.
test-rest: install
	$(PYTEST) -n 3 -m "slow or hosts"

# Every architecture that transformers has, against plain transformers; writes docs/models.md.
test-families: install
	rm -rf build/families
	$(PYTEST) -m families tests/families
	PYTHONPATH=tests $(BIN)/python tests/families/results.py

test-all: test test-rest test-families

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -m finray -p finray.training -p finray.tuning -p finray.cluster -p finray.k8s

check: lint test

# The documents as a site, in build/site.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Measures ratios side by side; takes six to seven hours on a quiet machine.
bench: install
	$(BIN)/python benchmarks/run_all.py

clean:
	rm -rf .venv build
