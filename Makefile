# Everything runs in a virtual environment of its own, made here from requirements.txt with Python 3.11 or newer.
PYTHON ?= python3
PY := .venv/bin/python
# Large pages for large arrays: the updates of a small model take a fifth less time. Heeded by glibc alone.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo see test lint docs pictures notebook wheel clean

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

docs: .venv-docs/installed  ## the documentation as a site, in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --clean  # not --quiet: strict counts what is logged

# The runs that the pictures are drawn from; docs/pictures.py names the command of each.
DEMO ?= runs/demo
OVER ?= runs/over
REUSE ?= runs/reuse
SCALING ?= runs/scaling
FRONTIER ?= runs/frontier

pictures: .venv/installed-test  ## the pictures of README and docs, from finished runs; a missing run is an error
	$(PY) docs/pictures.py --demo=$(DEMO) --over=$(OVER) --reuse=$(REUSE) --scaling=$(SCALING) \
	    --frontier=$(FRONTIER)

notebook: .venv/installed  ## runs the notebook at small sizes; tests/test_readme.py checks that its two files agree
	RUNS=$$(mktemp -d) && RLHF_JAX_SMALL=1 RLHF_JAX_RUNS=$$RUNS MPLBACKEND=agg $(PY) docs/notebooks/from_the_article.py && rm -r $$RUNS

wheel:  ## builds the wheel, installs it into an environment of its own, and runs it from another folder
	rm -rf build/wheel && mkdir -p build/wheel
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check build/wheel/*.whl
	cd / && $(CURDIR)/build/wheel/venv/bin/rlhf-jax --help
	cd / && $(CURDIR)/build/wheel/venv/bin/rlhf-jax ppo_summarize --config=ppo_summarize:tiny --help > /dev/null

clean:  ## the environments and the runs
	rm -rf .venv .venv-docs build site runs

# --no-compile: Python compiles what is imported, pip would compile all (28 s of 68).
.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, $(PYTHON) is {v[0]}.{v[1]}; try make PYTHON=python3.12")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

.venv/installed-test: .venv/installed requirements-test.txt
	$(PY) -m pip install --quiet --no-compile --disable-pip-version-check -r requirements-test.txt
	touch $@

.venv-docs/installed: pyproject.toml
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	$(PYTHON) -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"]))' > .venv-docs/requirements.txt
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-docs/requirements.txt
	touch $@
