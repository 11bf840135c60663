# The two commands of a newcomer are `make train` and `make test`; both create .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/placed_digits_tiny

.PHONY: install train test test-slow torture test-gpu lint docs clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

train: install
	$(BIN)/python train.py experiment=placed_digits_tiny
	$(BIN)/python eval.py checkpoint=$(RUN) probe=suite probe.attentive.steps=300
	$(BIN)/python -m mae.export $(RUN) --to timm --out $(RUN)/export/encoder.safetensors --overwrite
	$(BIN)/python -m mae.report $(RUN)
	$(BIN)/python -m mae.report.summary $(RUN)

# Two test files at a time, each on one core.
test: install
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# Real schedulers, signals and kills: a test that fails is run once more, and its first failure is printed.
test-slow: install
	$(BIN)/python -m pytest -m slow --numprocesses 2 --dist loadfile --reruns 1 -rR

# Killed twenty times on one and on two ranks, in every phase.
torture: install
	$(BIN)/python -m pytest -m 'slow or not slow' -s tests/test_kills.py

test-gpu: install
	$(BIN)/python -m pytest -m gpu

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# site/index.html, to be opened from disk.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf .venv site .pytest_cache .ruff_cache .hypothesis
