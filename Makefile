# Everything runs in a virtual environment of its own (.venv), made on first use.
VENV = .venv
PYTHON = $(VENV)/bin/python
PIP = $(PYTHON) -m pip install --disable-pip-version-check -q
JOBS = 2

.PHONY: run quick test lint bench notebooks

# The whole sequence on the embedded dataset; ends with the path of the report.
run: $(VENV)/installed
	$(PYTHON) -m stgan_utils run --data phantom --profile demo --out runs/demo --jobs $(JOBS)

# The same with released weights in place of GAN training: minutes, without a network.
quick: $(VENV)/installed
	$(PYTHON) -m stgan_utils run --data phantom --profile quick --out runs/quick --jobs $(JOBS)

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --dist loadfile

lint: $(VENV)/installed-dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

bench: $(VENV)/installed
	for script in $(filter-out benchmarks/common.py,$(wildcard benchmarks/*.py)); do $(PYTHON) $$script || exit 1; done

# Setup cell and badges of every notebook, then the six class notebooks from their template.
notebooks:
	python3 notebooks/render_setup.py
	python3 notebooks/render_classes.py

$(VENV)/installed: requirements.txt pyproject.toml | $(PYTHON)
	@echo "Installing into $(VENV): minutes the first time."
	$(PIP) -e .
	@touch $@

$(VENV)/installed-dev: requirements.txt pyproject.toml | $(PYTHON)
	@echo "Installing into $(VENV): minutes the first time."
	$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/installed

$(PYTHON):
	@python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	{ echo "Python 3.10 or newer with its venv module is needed: on Debian or Ubuntu, apt install python3 python3-venv." >&2; exit 2; }
	python3 -m venv $(VENV)
