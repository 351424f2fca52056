"""Fixtures that several test files share, and how Triton runs in all of them."""

import os

import fake_loader
import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton, which reads this once. It changes nothing but what test_triton.py checks:
    # without a GPU, Triton's compiler has nothing to compile for.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def one_thread():
    """Tiny models on one thread: on a busy machine, waiting for a second one takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fake_text(monkeypatch, one_thread):
    """Training runs read tests/fake_loader.py's little language instead of prepared files."""
    fake_loader.install(monkeypatch.setattr)
