"""Options that tests/ and bench/ share."""

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: tests run on every device there is, benchmarks on the GPU if there is one",
    )
    parser.addoption(
        "--kernels",
        default="cpp",
        metavar="IMPLEMENTATION",
        help="implementation of every operator under test on a GPU, as dispatch.override takes it",
    )


def pytest_configure(config):
    if (
        config.getoption("--device") == "auto"
    ):  # nothing to refuse; the process that only hands out files needs no torch
        return
    from bench import machine
    from cramfast.errors import UserError

    try:
        machine.devices(config.getoption("--device"))
    except UserError as error:
        raise pytest.UsageError(str(error)) from None
