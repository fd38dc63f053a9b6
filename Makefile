# make run   - question 1 (or: make run ARGS="--experiment Q2a")
# make test  - the tests
# make report - every question into report/README.md (make report SCALE=cpu: reduced where a CPU would take days)
PYTHON ?= python3
PY := .venv/bin/python

SCALE ?= full

.PHONY: run test report
run: .venv/installed
	$(PY) ex3_convnet.py $(ARGS)

test: .venv/installed
	$(PY) -m pytest $(ARGS)

report: .venv/installed
	$(PY) report/make.py --scale $(SCALE) $(ARGS)

# Written last, so that an interrupted installation is taken up again, and a finished one never repeated.
.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@
