"""FASTA: a record is a document, whatever its header, its line width and its case."""

import lzma
import random

import pytest
from test_prepare import OPTIONS, contents

from cramfast.errors import UserError
from cramfast.prepare import prepare
from cramfast.text import fasta, lines
from cramfast.text.corpus import Corpus
from cramfast.text.prepared import read_manifest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_fasta_is_read_as_sequences(tmp_path):
    rng = random.Random(1)
    records = ["".join(rng.choices("ACGT", k=rng.choice((50, 70, 101, 700)))) for _ in range(200)]

    def written(name, width, fold=str):
        lines = []
        for i, record in enumerate(records):
            cut = [record[j : j + width] for j in range(0, len(record), width)]
            lines += [f">seq{i} some words about it", *map(fold, cut), ""]
        opened = lzma.open if name.endswith(".xz") else open
        with opened(tmp_path / name, "wt") as file:
            file.write("\n".join(lines))
        return str(tmp_path / name)

    assert list(Corpus((written("a.fasta", 60),))) == records
    assert list(Corpus((written("b.fna.xz", 10_000, str.lower),))) == records
    made = [prepare((written(name, width),), tmp_path / name[0], tokenizer=kind, vocab_size=4160)
            for name, width in (("c.fa", 60), ("d.faa", 10**6)) for kind in ("kmer:4",)]  # fmt: skip
    assert contents(made[0]) == contents(made[1]) and read_manifest(made[0])["tokenizer"] == "kmer:4"
    assert read_manifest(prepare((written("e.fa", 70),), tmp_path / "e", **OPTIONS))["tokenizer"] == "bpe"
    for text, said in (("@read\nACGT", r"bad\.fa:1: FASTQ"), ("\nACGT\n>x", r"bad\.fa:2: no FASTA: a record begins")):
        (tmp_path / "bad.fa").write_text(text)
        with pytest.raises(UserError, match=said):
            list(Corpus((str(tmp_path / "bad.fa"),)))


def test_a_long_fasta_record_is_cut_and_a_long_header_is_none_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(fasta, "LONGEST_RECORD", 840)
    monkeypatch.setattr(lines, "LONGEST_PIECE", 500)
    sequence = "".join(random.Random(2).choices("ACGT", k=2000))
    (tmp_path / "a.fa").write_text(f">{'x>y ' * 1000}\n{sequence}\n>next\n;comment\nAC GT\n")
    assert list(Corpus((str(tmp_path / "a.fa"),))) == [sequence[:840], sequence[840:1680], sequence[1680:], "ACGT"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (">a\nACGT>b the second file\nGGTT\n", r":2: a header within a line, as where files without a line end"),
        (">a\nACGT\n >b\nGGTT\n", ":3: a header after a blank — begin the line with its '>'"),
        (">a\nACGT\n# comment\n", ":3: '#' is in no sequence"),
        (">a\nACGT\nError: no such file\n", ":3: ':' is in no sequence .* — convert the file, or take the line out"),
        (">a\n<!-- page\n", ":2: '<' is in no sequence"),
        (">a\nACGT\n@read\nACGT\n+\nIIII\n", ":3: FASTQ, as it looks"),
        (">a\n   1 acgtacgt acgt\n", ":2: a numbered line, as of GenBank or GCG"),
        (">a\nACGß\n", ":2: 'ß' is in no sequence"),
    ],
)
def test_what_is_no_sequence_is_refused_by_line(tmp_path, text, said):
    (tmp_path / "a.fa").write_text(text)
    with pytest.raises(UserError, match=rf"a\.fa{said}"):
        list(Corpus((str(tmp_path / "a.fa"),)))


def test_comments_cut_no_record_and_other_endings_are_read(tmp_path):
    for name in ("a.fas", "b.ffn", "c.frn", "d.fsa", "e.mpfa"):
        (tmp_path / name).write_text(">one\nAC-GT\n;a comment: 1\nAC.gt*\n>two\nGG\n")
    assert list(Corpus((str(tmp_path),))) == ["AC-GTAC.GT*", "GG"] * 5
    (tmp_path / "old.fa").write_text(";one\nACGT\n;two\nGG\n")
    assert list(Corpus((str(tmp_path / "old.fa"),))) == ["ACGT", "GG"]
