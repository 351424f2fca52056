"""Which files are read: what is passed over, hidden or reached twice is counted and said."""

import os

import pytest

from cramfast.errors import UserError
from cramfast.text.corpus import Corpus
from cramfast.text.files import file_format, find_files, list_files


def write(folder, *names, text="some text\n"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return str(folder)


def test_files_passed_over_are_counted_by_ending_and_said(tmp_path):
    write(tmp_path, "a.txt", text="words " * 10_000)
    source = write(tmp_path, "b.doc", "c.doc", "LICENSE", text="x" * 1000)
    corpus = Corpus((source,))
    assert len(list(corpus)) == 1
    (said,) = [line for line in corpus.notes() if ": passed over" in line]
    assert said == (
        f"{source}: passed over 3 files, 3 kB: .doc 2, without ending 1 — --format text reads them, or name the files "
        "alone"
    )
    assert len(find_files((source,), "text")) == 4


def test_files_passed_over_that_are_most_of_the_bytes_are_an_error(tmp_path):
    source = write(tmp_path, "a.txt")
    write(tmp_path, "wiki.train", "wiki.valid", text="words and words\n" * 100)
    with pytest.raises(UserError, match=r"passed over 2 files, 3.2 kB: \.train 1, \.valid 1, most of .* 10 bytes to r"):
        find_files((source,))
    assert len(list(Corpus((source,), "lines", format="text"))) == 201
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"no text in this folder \(passed over 2 files, 3.2 kB: .*--format text reads"):
        find_files((source,))


def test_a_pattern_whose_matches_are_all_unknown_says_that(tmp_path):
    pattern = write(tmp_path, "a.doc", "b.doc") + "/*.doc"
    with pytest.raises(UserError, match=r"\*\.doc: every file that matches is of an unknown kind, passed over 2 files"):
        find_files((pattern,))
    with pytest.raises(UserError, match=r"\*\.pdf: no such file or folder"):
        find_files((pattern.replace("doc", "pdf"),))
    assert len(find_files((pattern,), "text")) == 2


HIDDEN = (".git/a.txt", ".ipynb_checkpoints/b-checkpoint.txt", "__MACOSX/c.txt", "._d.txt", "in/.e.txt")


def test_hidden_names_are_left_out_and_said(tmp_path):
    source = write(tmp_path, "d.txt", "in/e.txt", *HIDDEN)
    for given, count in ((source, 5), (source + "/**/*.txt", 5)):
        listing = list_files((given,))
        assert sorted(path.name for path in listing.all()) == ["d.txt", "e.txt"]
        assert len(listing.hidden) == count and "left out 5 hidden files or folders (" in listing.notes()[0]
    assert len(find_files((source + "/__MACOSX", source + "/.git/a.txt", source + "/.*.txt"))) == 3  # asked for


def test_a_file_that_is_reached_twice_is_read_once_over_all_sources(tmp_path):
    source = write(tmp_path, "texts/a.txt", "texts/b.txt")
    texts = source + "/texts"
    os.symlink(texts + "/a.txt", texts + "/link.txt")
    os.link(texts + "/b.txt", source + "/hard.txt")
    os.symlink(texts, source + "/folder")
    sources = (texts, texts + "/a.txt", texts + "/*.txt", source + "/hard.txt", source + "/folder")
    listing = list_files(sources)
    assert [path.name for path in listing.all()] == ["a.txt", "b.txt"]
    assert "9 files reached by two paths, read once" in " ".join(listing.notes())
    assert len(list(Corpus(sources))) == 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.TXT", "text"), ("a.ndjson.bgz", "jsonl"), ("a.csv.bz2", "csv"), ("a.tsv", "tsv"), ("a.feather", "arrow"),
        ("a.arrow", "arrow"), ("wiki_00", "wikiextractor"), ("wiki_123.bz2", "wikiextractor"), ("a.train", None),
        ("a", None), ("wiki_x", None),
    ],
)  # fmt: skip
def test_the_kind_of_a_file_is_that_of_its_name(tmp_path, name, kind):
    assert file_format(tmp_path / name) == kind
    assert file_format(tmp_path / name, "tsv") == "tsv"


def test_an_unknown_format_is_named(tmp_path):
    with pytest.raises(UserError, match=r"format='docx' is not known — use one of auto, text"):
        find_files((write(tmp_path, "a.txt"),), "docx")


def test_a_folder_of_hidden_files_alone_says_so(tmp_path):
    with pytest.raises(
        UserError, match=r"no text in this folder \(left out 1 hidden files or folders \(.*\.git\); name"
    ):
        find_files((write(tmp_path, ".git/a.txt"),))


def test_links_that_lead_nowhere_and_files_without_a_document_are_said(tmp_path):
    source = write(tmp_path, "a.txt")
    write(tmp_path, "b.txt", "c.jsonl", text="\n \n")
    os.symlink(tmp_path / "gone.txt", tmp_path / "link.txt")
    corpus = Corpus((source,))
    assert list(corpus) == ["some text"]
    assert corpus.notes() == [
        f"{source}: 1 links lead nowhere, the first {source}/link.txt — mend or remove them",
        f"{source}: 2 files hold no document",
    ]


def test_a_folder_that_may_not_be_entered_is_an_error(tmp_path, monkeypatch):
    source, scandir = write(tmp_path, "a.txt", "closed/b.txt"), os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=r"closed: cannot be read \(Permission denied\) — check its permissions"):
        find_files((source,))
