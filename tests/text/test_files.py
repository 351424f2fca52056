"""Which files are read: what is passed over, hidden or reached twice is counted and said."""

import gzip
import io
import json
import os

import pyarrow
import pyarrow.ipc
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
    source = write(tmp_path, "b.log", "c.log", "LICENSE", text="x" * 1000)
    corpus = Corpus((source,))
    assert len(list(corpus)) == 1
    (said,) = [line for line in corpus.notes() if ": passed over" in line]
    assert said == (
        f"{source}: passed over 3 files, 3 kB: .log 2, without ending 1 — --format text reads them, or name the files "
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
    pattern = write(tmp_path, "a.log", "b.log") + "/*.log"
    with pytest.raises(UserError, match=r"\*\.log: every file that matches is of an unknown kind, passed over 2 files"):
        find_files((pattern,))
    with pytest.raises(UserError, match=r"\*\.pdf: no such file or folder"):
        find_files((pattern.replace("log", "pdf"),))
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
    write(tmp_path, "b.txt", text="\n \n")
    write(tmp_path, "c.jsonl", text="\n")
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


def arrow(path, *texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    out, table = io.BytesIO(), pyarrow.table({"text": texts})
    with pyarrow.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    path.write_bytes(out.getvalue())


def saved(folder, *texts):
    """As save_to_disk writes it, and map() beside it."""
    arrow(folder / "data-00000-of-00001.arrow", *texts)
    arrow(folder / "cache-1f2e.arrow", "of map()")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_saved_data_set_is_its_rows_and_no_cache(tmp_path):
    saved(tmp_path / "ds", "one", "two")
    for source in (f"{tmp_path}/ds", f"{tmp_path}/ds/*.arrow"):
        corpus = Corpus((source,))
        assert list(corpus) == ["one", "two"]
        (said,) = corpus.notes()
        assert "left out 1 file: Arrow files that are not of the data set beside them (cache-*.arrow" in said


def test_a_saved_data_set_without_one_of_its_files_is_refused(tmp_path):
    saved(tmp_path / "ds", "one")
    (tmp_path / "ds" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(
        UserError, match=r"ds: data-00000-of-00001\.arrow is not there, which state\.json names — fetch"
    ):
        list_files((f"{tmp_path}/ds",))


def test_of_saved_splits_the_one_for_training_is_read(tmp_path):
    for name in ("train", "test", "validation"):
        saved(tmp_path / "ds" / name, f"of {name}")
    (tmp_path / "ds" / "dataset_dict.json").write_text('{"splits": ["train", "test", "validation"]}')
    corpus = Corpus((f"{tmp_path}/ds",))
    assert list(corpus) == ["of train"]
    for name in ("test", "validation"):
        whole = tmp_path / "ds"
        left = (
            f"left out 4 files: the split {name} of {whole}, which is not for training — name {whole / name} to read it"
        )
        assert any(left in line for line in corpus.notes())
    corpus = Corpus((f"{tmp_path}/ds/test", f"{tmp_path}/ds/train"))
    assert list(corpus) == ["of test", "of train"]
    assert any(f"reads test (1 files), train (1 files) of {tmp_path}/ds" in line for line in corpus.notes())
    (tmp_path / "ds" / "dataset_dict.json").write_text('{"splits": ["test", "validation"]}')
    corpus = Corpus((f"{tmp_path}/ds",))
    assert len(list(corpus)) == 3 and any("reads test (1 files), validation (1 files) of" in n for n in corpus.notes())


@pytest.mark.parametrize(
    ("names", "remedy"),
    [
        (["a.zip", "b.tar.gz"], "unpack archives, or"),
        (["a.pdf", "b.log"], "convert documents to text; --format text reads the others, or"),
        (["a.fastq"], "convert sequences to FASTA, or"),
        (["a.orc"], r"write tables as \.parquet, or"),
        (["a.json"], r"\.json is read where it is an array of objects, or has an object a line, or"),
    ],
)
def test_the_remedy_of_files_passed_over_is_that_of_their_kind(tmp_path, names, remedy):
    write(tmp_path, "in/a.txt")
    write(tmp_path, *(f"in/{name}" for name in names), text="x")
    (line,) = list_files((f"{tmp_path}/in",)).notes()
    assert line.endswith(f"— {remedy} name the files alone".replace("\\", ""))
    write(tmp_path, *(f"in/{name}" for name in names), text="x" * 100)
    with pytest.raises(UserError, match=rf"most of what is there.* — {remedy}"):
        list_files((f"{tmp_path}/in",))
    if names[0] != "a.json":
        with pytest.raises(
            UserError, match=rf"{names[0]}: unknown kind of file — .*; {remedy.split(';')[0].split(',')[0]}"
        ):
            list_files((f"{tmp_path}/in/{names[0]}",))


def test_a_text_beside_its_archive_is_read_once_and_other_copies_are_said(tmp_path):
    write(tmp_path, "a.txt", "b.txt", text="some text\n")
    write(tmp_path, "c.txt", text="other text\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some text\n"))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"not the same\n"))
    corpus = Corpus((str(tmp_path),))
    assert list(corpus) == ["some text", "some text", "other text", "not the same"]
    assert [line.removeprefix(f"{tmp_path}: ") for line in corpus.notes()] == [
        f"left out 1 file with the text of one beside them, the first: {tmp_path}/a.txt and a.txt.gz hold "
        "the same text",
        f"1 file of the same bytes as another, read as well, the first: {tmp_path}/b.txt and {tmp_path}/a.txt hold the "
        "same text — remove one, or --curation.duplicates exact keeps each document once",
    ]


def test_a_pipe_is_counted_in_a_folder_and_refused_where_it_is_named(tmp_path):
    source = write(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "b.txt")
    assert list_files((source,)).notes() == [
        "passed over 1 file, 0 bytes: pipe or device 1 — write what a pipe gives to a file, or name the files alone"
    ]
    with pytest.raises(
        UserError, match=r"b\.txt: a pipe or a device, which cannot be read twice — write what it gives"
    ):
        list_files((source + "/b.txt",))


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_no_folder(name):
    with pytest.raises(UserError, match=r"data: an empty name — name files or folders; \. is the folder at hand"):
        list_files((name,))


def test_brackets_of_a_folder_in_a_pattern(tmp_path):
    source = write(tmp_path, "texts [2024]/a.txt")
    assert len(find_files((f"{source}/texts [2024]",))) == 1
    with pytest.raises(
        UserError, match=r"nothing matches it, since \[ \] are signs of a pattern — write '.*\[\[\]2024"
    ):
        list_files((f"{source}/texts [2024]/*.txt",))
    assert len(find_files((f"{source}/texts [[]2024]/*.txt",))) == 1
    write(tmp_path, "texts 2/a.txt")
    (line,) = list_files((f"{source}/texts [2024]/*.txt",)).notes()
    assert line.startswith("left out 1 file: of names with brackets, which are signs of a pattern — write '")
