"""Compressed text comes whole, with what the formats allow between streams, or not at all."""

import bz2
import gzip
import lzma
import random

import pytest

from cramfast.errors import UserError
from cramfast.text.corpus import Corpus

HALVES = [" ".join(random.Random(i).choices(["some", "words", "of", "a", "text"], k=20_000)) for i in range(2)]
PACK = {".gz": gzip.compress, ".bgz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def packed(path, between=b"", after=b"", damage=lambda second: second):
    first, second = (PACK[path.suffix](half.encode()) for half in HALVES)
    path.write_bytes(first + between + damage(second) + after)
    return "".join(Corpus((str(path),)))


@pytest.mark.parametrize("ending", PACK)
def test_several_streams_are_one_text(tmp_path, ending):
    assert packed(tmp_path / f"a.txt{ending}") == "".join(HALVES)


@pytest.mark.parametrize("zeros", [4, 8, 1 << 18, (1 << 18) + 4])
def test_padding_between_and_after_xz_streams(tmp_path, zeros):
    assert packed(tmp_path / "a.txt.xz", bytes(zeros), bytes(zeros)) == "".join(HALVES)


def cut(data):
    return data[: len(data) // 2]


def spoilt_head(data):
    return b"\x00" + data[1:]


def spoilt_inside(data):
    return data[: len(data) // 2] + b"\xff" * 40 + data[len(data) // 2 + 40 :]


@pytest.mark.parametrize("damage", [cut, spoilt_head, spoilt_inside])
@pytest.mark.parametrize("ending", PACK)
def test_a_damaged_second_stream_is_refused(tmp_path, ending, damage):
    with pytest.raises(UserError, match=rf"a\.txt\{ending}: damaged or truncated archive"):
        packed(tmp_path / f"a.txt{ending}", damage=damage)


@pytest.mark.parametrize(("ending", "after"), [(".xz", bytes(3)), (".xz", b"more"), (".bz2", b"more"), (".gz", b"x")])
def test_anything_after_the_last_stream_is_refused(tmp_path, ending, after):
    with pytest.raises(UserError, match=rf"a\.txt\{ending}: damaged or truncated archive"):
        packed(tmp_path / f"a.txt{ending}", after=after)


def test_a_zstandard_window_of_two_gibibytes_is_read(tmp_path):
    """A frame of --long=31, written by hand (RFC 8878, section 3.1.1): the window is a field of its header."""
    text = b"text of a large dump"
    magic, descriptor, window = b"\x28\xb5\x2f\xfd", b"\x00", bytes([(31 - 10) << 3])
    last_raw_block = ((len(text) << 3) | 1).to_bytes(3, "little") + text
    (tmp_path / "a.txt.zst").write_bytes(magic + descriptor + window + last_raw_block)
    assert list(Corpus((str(tmp_path),))) == [text.decode()]
