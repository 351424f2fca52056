"""Fixtures that several test files share, and how torch and Triton run in all of them."""

import os
from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the options
def pytest_cmdline_main(config):
    """The whole suite runs on all cores, a file to a process; a part of it, or with -n or --pdb, as ever."""
    whole = not config.option.keyword and [Path(a).resolve() for a in config.args] == [Path(__file__).parent]
    alone = "PYTEST_XDIST_WORKER" not in os.environ  # a worker comes here as well
    if whole and alone and getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses, config.option.dist = len(os.sched_getaffinity(0)), "loadfile"


def pytest_configure(config):
    """How torch and Triton run, in processes that run tests: that which only hands out files saves the import.

    Workers of pytest-xdist share the cores; so do the processes that tests start.
    """
    if getattr(config.option, "numprocesses", 0):
        return
    import torch

    if not torch.cuda.is_available():
        # Before anything imports Triton, which reads this once. It changes nothing but what test_triton.py checks:
        # without a GPU, Triton's compiler has nothing to compile for.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        threads = max(1, len(os.sched_getaffinity(0)) // int(workers))
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


@pytest.fixture
def one_thread():
    """Tiny models on one thread: on a busy machine, waiting for a second one takes longer than the work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fake_text(monkeypatch, one_thread):
    """Training runs read tests/fake_loader.py's little language instead of prepared files."""
    import fake_loader

    fake_loader.install(monkeypatch.setattr)


@pytest.fixture
def nan_memory(monkeypatch):
    """Call it, and torch.empty and its kin hand out NaN from there on: what no kernel wrote, or one read too early,
    shows."""
    import torch

    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(tensor):
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    def begin():
        monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
        monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))

    return begin
