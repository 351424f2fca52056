"""The peak that MFU refers to: measured again on a busy machine, and marked where it stays busy."""

import pytest
import torch

from cramfast.session import metrics
from cramfast.session.record import Record

SIZE = 2 * metrics.PEAK_SIZE["cpu"] ** 3


def peak_of(monkeypatch, *attempts) -> tuple[metrics.MatmulPeak, int]:
    """measure_matmul_peak() where the attempts give these (seconds, share of the cores), and how many it made."""
    left = list(attempts)
    monkeypatch.setattr(metrics, "_timed", lambda work, device: left.pop(0))
    monkeypatch.setitem(metrics.PEAK_SIZE, "cpu", 8)
    found = metrics.measure_matmul_peak(torch.float32, torch.device("cpu"))
    return found, len(attempts) - len(left)


@pytest.mark.parametrize(
    ("attempts", "best", "busy", "made"),
    [
        ([([1.0, 1.05, 1.1], 1.0)], 1.0, False, 1),
        ([([2.0, 3.0, 3.0], 1.0), ([1.0, 1.0, 1.1], 0.98)], 1.0, False, 2),  # the repeats differ
        ([([2.0, 2.0, 2.0], 0.6), ([1.0, 1.0, 1.0], 0.99)], 1.0, False, 2),  # another process on the cores
        ([([2.0, 2.0, 2.0], 0.6), ([1.9, 1.9, 2.0], 0.6), ([2.0, 2.1, 2.0], 0.6)], 1.9, True, 3),
    ],
)
def test_a_busy_machine_is_measured_again(monkeypatch, attempts, best, busy, made):
    found, times = peak_of(monkeypatch, *attempts)
    assert found == metrics.MatmulPeak(pytest.approx(2 * 8**3 / best), busy) and times == made


def test_the_share_of_the_cores_is_measured(one_thread):
    """Work of this process takes its whole core, or less where others run too; waiting takes none of it."""
    import time

    a = torch.randn(1200, 1200)
    seconds, share = metrics._timed(lambda: a @ a, torch.device("cpu"))
    assert len(seconds) == 6 and 0.05 < share < 1.2
    assert metrics._timed(lambda: time.sleep(0.02), torch.device("cpu"))[1] < 0.2


@pytest.mark.parametrize(
    ("busy", "mfu", "mark"), [(False, 0.3, ""), (True, 0.3, " (machine busy)"), (False, 1.1, " (machine busy)")]
)
def test_a_doubtful_mfu_is_marked(busy, mfu, mark):
    assert Record("run", None, {"matmul_peak_busy": busy}, [{"step": 1, "mfu": mfu}]).mfu_mark == mark
