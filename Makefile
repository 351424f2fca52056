# Shortcuts for developers; each line works on its own too.
PYTHON ?= python

.PHONY: build test bench lint

build:  ## compile the extension into ./cramfast, incrementally
	cmake -S . -B build/dev -G Ninja -DPython_EXECUTABLE=$$($(PYTHON) -c 'import sys; print(sys.executable)') \
	    -DPYBIND11_FINDPYTHON=ON -Dpybind11_DIR=$$($(PYTHON) -m pybind11 --cmakedir) \
	    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/cramfast
	cmake --build build/dev

test:
	$(PYTHON) -m pytest

bench:
	$(PYTHON) -m pytest bench/

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
