# Everything runs in a virtual environment of its own, pinned by constraints.txt.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: install quickstart rlhf test lint check bench clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
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

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p finray.training -p finray.tuning -p finray.cluster -p finray.k8s

check: lint test

# Measures ratios side by side; takes about half an hour on a quiet machine.
bench: install
	$(BIN)/python benchmarks/run_all.py

clean:
	rm -rf .venv build runs
