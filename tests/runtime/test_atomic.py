"""Files that are whole or absent, whoever else writes them."""

import pytest

from cramfast.runtime import atomic


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "file.json"
    assert atomic.partial_path(path) != atomic.partial_path(path), "two threads, two processes, two machines"
    atomic.write_text(path, "one")
    atomic.write_text(path, "two")
    assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]


def test_a_refusal_leaves_nothing_beside_what_was_there(tmp_path):
    path = tmp_path / "file.json"
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        atomic.write_text(path, "text")
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_is_known_and_swept(tmp_path):
    left, other = atomic.partial_path(tmp_path / "config.json"), tmp_path / ".run.partial"
    for path in (left, other):
        path.touch()
    assert atomic.is_partial(left) and not atomic.is_partial(other)
    atomic.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [other]
