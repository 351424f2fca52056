# Shortcuts for developers; each line works on its own too.
PYTHON ?= python
BUILD ?= build/dev
OUTPUT ?= $(CURDIR)/cramfast

.PHONY: build test bench lint

build:  ## compile the extension into $(OUTPUT), incrementally; CMAKE_ARGS and CUDAARCHS as for pip install
	cmake -S . -B $(BUILD) -G Ninja -DPython_EXECUTABLE=$$($(PYTHON) -c 'import sys; print(sys.executable)') \
	    -DPYBIND11_FINDPYTHON=ON -Dpybind11_DIR=$$($(PYTHON) -m pybind11 --cmakedir) \
	    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(OUTPUT) $(CMAKE_ARGS)
	cmake --build $(BUILD)

test:
	$(PYTHON) -m pytest

bench:
	$(PYTHON) -m pytest bench/

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
