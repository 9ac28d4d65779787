# make demo   train a small model on the Python standard library's source, then compare ways of decoding
# make test   run the tests that are lessons; make test-all also runs the slow ones, which only guard
# make clean  delete the virtual environment and all runs
# The first two make .venv, their virtual environment; PYTHON=python3.12 and PIP_FLAGS=... can be given.
# VEC_ISA_OK lets torch.compile trust what the CPU says of itself: its test programs for every
# instruction set take up to 15 seconds. TORCH is the newest PyTorch that both commands were timed with.

PYTHON ?= python3
PIP_FLAGS ?=
TORCH ?= 'torch<2.14'
PY := .venv/bin/python
RUN := runs/demo

.PHONY: demo test test-all clean

demo: .venv/installed
	$(PY) data/prepare.py python
	@if [ -f $(RUN)/checkpoint.pt ]; then $(PY) train.py --resume $(RUN); \
	else $(PY) train.py --data data/python --out $(RUN) --offsets 1,2,3,4,5,7 --sequential \
		--n-layer 4 --n-head 2 --n-embd 96 --steps 1000 --lr 1e-2; fi
	TORCHINDUCTOR_VEC_ISA_OK=1 $(PY) decode.py $(RUN) --methods lookup 1,2,3,4 1,3,5,7 --prompts 8 \
		--temperature 0 --out $(RUN)/table.json
	@echo "next: $(PY) decode.py $(RUN) --prompt 'def main('    or, with sampled text: $(PY) decode.py $(RUN)"

test: .venv/installed-test
	$(PY) -m pytest -m "not slow"

test-all: .venv/installed-test
	$(PY) -m pytest

.venv/installed: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'needs Python 3.10 or newer; name one with PYTHON=...')"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check $(PIP_FLAGS) -e . $(TORCH)
	@touch $@

.venv/installed-test: .venv/installed
	$(PY) -m pip install --disable-pip-version-check $(PIP_FLAGS) -e '.[test]'
	@touch $@

clean:
	rm -rf .venv runs
