"""What a corpus holds never tells a terminal what to do."""

import io

import pytest
from rich.console import Console

from cramfast import errors
from cramfast.errors import UserError, note, printable
from cramfast.hf import demo
from cramfast.text.corpus import Corpus

EVIL = "\x1b[2J\x1b]0;title\x07 \x9b31m red \u202e reversed \x08\x08"


def obeyed(text):
    return [c for c in text if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 or c in "\u202e\u2066"]


def test_what_a_terminal_obeys_is_escaped():
    assert not obeyed(printable(EVIL)) and printable(EVIL).startswith("\\x1b[2J\\x1b]0;title\\x07 \\x9b31m red \\u202e")
    assert printable("Größe\t日本語, 🙂\n") == "Größe\t日本語, 🙂\n"


def test_messages_and_notes_are_escaped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(errors.sys.stdout, "reconfigure", lambda **_: None, raising=False)
    (tmp_path / "a.jsonl").write_text('{"\\u001b[2J": "x"}\n')

    def main():
        list(Corpus((str(tmp_path / "a.jsonl"),)))

    with pytest.raises(UserError, match="\x1b"):
        main()
    with pytest.raises(SystemExit):
        errors.command(main)
    note(EVIL)
    with pytest.raises(SystemExit):
        errors.command(lambda: next(iter(Corpus((str(tmp_path / "no\n  such\u2028file.txt"),)))))
    said = capsys.readouterr().err
    assert not obeyed(said) and said.count("\\x1b[2J") == 2 and len(said.splitlines()) == 3


def test_the_demonstration_is_escaped():
    out = io.StringIO()
    demo.show(Console(file=out, width=200), [(f"{EVIL} [MASK] {EVIL}", [(EVIL, 0.5)], EVIL)])
    assert not obeyed(out.getvalue()) and out.getvalue().count("\\x1b[2J") == 4
