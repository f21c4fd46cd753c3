PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test test-slow test-nightly test-faults test-attacks lint bench docs clean

run: $(VENV)/installed  ## fine-tune the embedded model across four sites; results in runs/
	$(BIN)/lalora run

test: $(VENV)/installed lint  ## style, types and the fast tests
	$(BIN)/pytest -m "not slow and not faults" tests/probes  # a process of their own: they register themselves for good
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not faults" --ignore=tests/probes

test-slow: $(VENV)/installed  ## the tests that start real Flower simulations
	$(BIN)/pytest --durations=12 -m "slow and not nightly"

test-nightly: $(VENV)/installed  ## what test-slow only samples: every extension of tests/probes under Ray, what docs/ asks minutes for, jax_privacy
	$(BIN)/pip install --quiet --disable-pip-version-check "jax_privacy>=2,<3"  # 400 MB, an oracle of the audit's bounds
	$(BIN)/pytest -m nightly
	$(BIN)/pytest tests/audit/test_oracle.py

test-faults: $(VENV)/installed  ## kill -9 of sites, servers and simulations at random moments; about 25 minutes
	$(BIN)/pytest --durations=12 -m faults

test-attacks: $(VENV)/installed  ## the attacks of a hostile server with ten times the drawn orders, other ones each time; about half an hour
	LALORA_ATTACK_EXAMPLES=20000 $(BIN)/pytest tests/attacks

bench: $(VENV)/installed  ## step time and memory against the non-private step and Opacus; about 15 minutes
	$(BIN)/python -W ignore -m benchmarks.engine

docs: $(VENV)/installed  ## the documentation as a site, in site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # no --quiet: it would hide the warnings from --strict

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs site .pytest_cache .ruff_cache .mypy_cache .hypothesis

# Made again whenever the dependencies change. The tests run with the versions that the image has (docker/pins.py renews them).
$(VENV)/installed: pyproject.toml docker/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint docker/constraints.txt -e ".[dev]"
	touch $@
