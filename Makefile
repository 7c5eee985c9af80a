# Everything runs in a virtual environment of its own, made here from requirements.txt with Python 3.11 or newer.
PYTHON ?= python3
PY := .venv/bin/python
# Large pages for large arrays: the updates of a small model take a fifth less time. Heeded by glibc alone.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo see test lint clean

demo: .venv/installed  ## the main job on the embedded task: fine-tuning, reward model, PPO
	$(PY) experiments/ppo_summarize.py --config=configs/ppo_summarize.py --workdir=runs/demo
	$(PY) -m rlhf_jax.viz verify runs/demo

see: .venv/installed  ## the page of the small run that is in the package
	$(PY) experiments/serve.py

test: .venv/installed-test  ## the whole suite
	$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/installed-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:  ## the environment and the runs
	rm -rf .venv runs

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}; try make PYTHON=python3.12")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@
