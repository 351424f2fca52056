"""The cache where it cannot be: no home, no right to read, no locks, two runs at one time; and what its key holds."""

import errno
import fcntl
import pwd
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_resolve
from fake_loader import small_config
from test_resolve import FakeTrial, resolved

from cramfast.errors import UserError
from cramfast.kernels import extension
from cramfast.qualify import cache, resolve
from cramfast.qualify.regime import regime_of

card = test_resolve.card  # the fixture, which is used by every test here too


def file_in(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache" / "cramfast" / "qualified").glob("*.json")
    return file


def test_without_a_home_nothing_is_kept_and_training_goes_on(monkeypatch, tmp_path, capsys):
    def unknown(number):
        raise KeyError(number)

    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert resolved(tmp_path / "run").implementation == "right"
    assert "not kept, as there is no home folder: set XDG_CACHE_HOME" in capsys.readouterr().out
    resolve.remember(small_config(), tmp_path / "run", [])


def test_a_cache_that_may_not_be_read_is_told_of(monkeypatch, tmp_path, capsys):
    resolved(tmp_path / "first")
    file, plain = file_in(tmp_path), Path.read_text

    def refused(self, *arguments, **options):
        if self == file:
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refused)
    assert resolved(tmp_path / "second").implementation == "right" and len(FakeTrial.tried) == 2
    assert f"note: {file}: cannot be read (Permission denied)" in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot be read"):
        cache.read(file)


def test_file_systems_without_locks_are_told_of(monkeypatch, tmp_path, capsys):
    def none(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert resolved(tmp_path / "run").implementation == "right"
    assert "cannot be locked (No locks available)" in capsys.readouterr().out and file_in(tmp_path).exists()


def test_a_second_run_waits_and_then_reads(monkeypatch, tmp_path, capsys):
    config = small_config()
    place = cache.place_of(regime_of(config))
    path = cache.path_of(place, resolve.tasks(config))
    first = cache.locked(path, 300.0)

    def while_it_waits(seconds):
        resolve.keep(path, resolve.tried(config, tmp_path, 60.0, cache.Outcome(place, ()), None))
        first.__exit__(None, None, None)

    first.__enter__()
    assert path.with_suffix(".lock").read_text() == "300.0"
    monkeypatch.setattr(cache.time, "sleep", while_it_waits)
    assert resolved(tmp_path / "run").implementation == "right" and len(FakeTrial.tried) == 1
    assert "another run tries kernels on this card; waiting for it, 315 s at most" in capsys.readouterr().out


def test_a_run_that_takes_too_long_is_waited_for_no_longer(monkeypatch, tmp_path, capsys):
    config, clock = small_config(), [0.0]
    path = cache.path_of(cache.place_of(regime_of(config)), resolve.tasks(config))
    passing = SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda s: clock.__setitem__(0, clock[0] + 1))
    with cache.locked(path, 1e9):
        monkeypatch.setattr(cache, "time", passing)
        assert resolved(tmp_path / "run").implementation == "right"
    said = capsys.readouterr().out
    assert "waiting for it, 3615 s at most" in said and "takes longer than it may; this one tries" in said
    assert clock[0] == pytest.approx(3616.0)


def test_our_hash_is_of_sources_and_how_they_were_built(monkeypatch, tmp_path):
    plain = cache.our_hash()
    other = tmp_path / "_C.so"
    other.write_bytes(b"another build of the same")
    monkeypatch.setitem(sys.modules, "cramfast._C", SimpleNamespace(__file__=str(other)))
    assert cache.our_hash() == plain
    built = SimpleNamespace(cuda=True, cuda_toolkit="13.0", cuda_architectures=["sm_86"])
    monkeypatch.setattr(extension, "module", built)
    with_cuda = cache.our_hash()
    built.cuda_toolkit = "12.8"
    assert len({plain, with_cuda, cache.our_hash()}) == 3


def test_the_versions_of_others_kernels_are_part_of_the_key(monkeypatch):
    monkeypatch.setattr(cache, "version", lambda package: f"1 of {package}")
    found = cache.software()
    assert (found["flash_attn"], found["apex"], found["triton"]) == ("1 of flash-attn", "1 of apex", "1 of triton")
