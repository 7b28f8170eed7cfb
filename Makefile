# make demo, make test: they install everything themselves, given Python >= 3.11. To choose one:
# PYTHON=python3.12 make …
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
# Number of test processes: one per core, up to 6 GB of memory each. JOBS=4 make test …
JOBS ?= 2
# Files run in the order that tests/conftest.py gives them.
PYTEST = $(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
PIP = $(PY) -m pip install --quiet --disable-pip-version-check
# One lock file per tested Python version: exact versions of all packages, with their hashes.
LOCKED = 3.11 3.12
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
LOCK := $(wildcard requirements/lock-$(VERSION).txt)

.PHONY: setup lock demo demo-mar quick test lint docs soak damage faults gpu-report tpu-report clean

setup: $(VENV)/ready

# Every package is checked against its hash; build tools come from a lock file too.
$(VENV)/ready: pyproject.toml setup.py constraints.txt $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit("varjax needs Python 3.11 or newer, $(PYTHON) is %s; set PYTHON=…" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
ifdef LOCK
	$(PIP) --require-hashes -r requirements/lock-build.txt
	$(PIP) --require-hashes --no-build-isolation -r $(LOCK)
	$(PIP) --no-build-isolation --no-deps -e .
else
	@echo "note: no lock file for Python $(VERSION); using constraints.txt without checking hashes"
	$(PIP) -e ".[dev]" -c constraints.txt
endif
	@touch $@

# Needs uv (pip install uv). Keeps versions that still satisfy pyproject.toml and constraints.txt;
# UPGRADE=--upgrade make lock updates all of them.
lock:
	echo setuptools | uv pip compile --quiet --no-header - --generate-hashes $(UPGRADE) \
		--python-version 3.11 --python-platform linux -o requirements/lock-build.txt
	for version in $(LOCKED); do \
		uv pip compile --quiet --no-header pyproject.toml --extra dev --generate-hashes $(UPGRADE) \
			-c constraints.txt -c requirements/lock-build.txt --python-version $$version \
			--python-platform linux -o requirements/lock-$$version.txt || exit 1; \
	done

demo: setup
	$(PY) train.py --config=configs/digits_tokenizer.py
	$(PY) train.py --config=configs/digits.py
	@$(MAKE) --no-print-directory runs/digits/samples.npz
	$(PY) -m varjax.evaluation.digits_report --run=runs/digits --samples=runs/digits/samples.npz
	@echo "To draw in a browser: $(VENV)/bin/varjax demo --weights=runs/digits"

demo-mar: setup
	$(PY) train.py --config=configs/digits_kl_tokenizer.py
	$(PY) train.py --config=configs/digits_mar.py
	@$(MAKE) --no-print-directory runs/digits_mar/samples.npz
	$(PY) -m varjax.evaluation.digits_report --run=runs/digits_mar --tokenizer=runs/digits_kl_tokenizer \
		--samples=runs/digits_mar/samples.npz --compare=runs/digits
	@echo "To draw in a browser: $(VENV)/bin/varjax demo --weights=runs/digits_mar"

# Sampled again only after more training, which updates metrics.jsonl.
runs/%/samples.npz: runs/%/metrics.jsonl
	@rm -f $@
	$(PY) sample.py --weights=$(@D) --labels=all --count=100 --batch_size=250 --out=$@

quick: setup
	$(PYTEST) -m "not slow"

test: setup
	$(PYTEST)

lint: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

# Builds the site of README and docs/: build/site/index.html. A warning is an error.
docs: $(VENV)/docs-ready
	$(PY) -m sphinx --quiet --fail-on-warning --keep-going -c docs/site -d build/doctrees . build/site
	@echo "build/site/index.html"

$(VENV)/docs-ready: $(VENV)/ready
	$(PIP) --no-build-isolation -e ".[docs]" -c constraints.txt
	@touch $@

# Interrupts a run 100 times at random moments. Takes about half an hour, so `make test` omits it.
soak: setup
	$(PY) -m tests.helpers.soak --folder=runs/soak --events=100

# Damages each file of a run in every way. Takes over an hour, so `make test` runs only a sample.
damage: setup
	$(PY) -m tests.helpers.damage_sweep --folder=runs/damage/bits
	$(PY) -m tests.helpers.damage_sweep --folder=runs/damage/one --processes=1
	$(PY) -m tests.helpers.damage_sweep --folder=runs/damage/two --processes=2

# Makes each kind of file operation of each command fail once with each error. Takes hours;
# MINUTES=20 make faults stops sooner (0: no limit).
MINUTES ?= 0
faults: setup
	$(PY) -m tests.helpers.fault_sweep --folder=runs/faults --minutes=$(MINUTES)

# Measures the GPU or TPU of this machine: eight minutes, and the set-up before it.
gpu-report tpu-report: %-report: setup
	$(PIP) -e ".[$(if $(filter gpu,$*),cuda,tpu)]" -c constraints.txt
	$(PY) -m varjax benchmark report --out=runs/report_$$(date +%Y%m%d_%H%M%S)

clean:
	rm -rf $(VENV) .pytest_cache build *.egg-info
