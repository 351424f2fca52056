"""What one reading of the text met that is no text: counted, to be said at its end."""

from collections import Counter
from dataclasses import dataclass, field

from cramfast.errors import UserError

FLAT_CHARACTERS = 10_000  # of a text file without a blank line, from which it is hardly one document
LEAST_SEPARATORS = 5
SEPARATORS = {  # what ends no line, but may be meant so where nothing else does
    "\0": "NULs",
    "\x0b": "vertical tabs (U+000B)",
    "\x0c": "form feeds (U+000C)",
    "\x1e": "record separators (U+001E)",
    "\x85": "next lines (U+0085)",
    "\u2028": "line separators (U+2028)",
    "\u2029": "paragraph separators (U+2029)",
}
NOTED = {
    "separators": (
        "{count:,} text files have no line ends and are one document each, the first: {first} — put line ends in their "
        "place, a blank line between documents, or --documents files says that it is meant"
    ),
    "padding": "{count:,} NULs that fill up files are no text and left out, the first in {first}",
    "object": "{count:,} text files begin with a line that is a JSON object, the first: {first} — see that it is text",
    "joined": "{count:,} cells may hold many rows each, the first: {first} — see whether a quote is closed too late",
    "header": "{count:,} rows repeat the header and are no documents, the first: {first}",
    "missing": "{count:,} cells are markers of missing values and no documents, the first: {first}",
    "quoted": (
        "{count:,} texts stand in quotes, as spreadsheets write them, and keep these, the first: {first} — name the "
        "file .csv to read them as quotes"
    ),
    "half": (
        "{count:,} texts hold halves of surrogate pairs, which are no characters and become '?', the first: {first} — "
        "write them again, or leave it so"
    ),
}


@dataclass
class Tally:
    """Attributes:
    most_malformed: rows that may be left out; the next one is an error.
    malformed: rows that were left out, the first of them at `first_malformed`.
    noted: rows and files of each kind of NOTED, the first of each in `first`.
    without_text: rows whose text is null.
    blank_text: rows whose text is empty.
    empty: files without any document.
    flat: text files of some length without a blank line, with `flat_characters` in all; `flat_lines`: those that
        have lines.
    """

    most_malformed: int = 0
    malformed: int = 0
    first_malformed: str = ""
    noted: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    without_text: int = 0
    blank_text: int = 0
    empty: int = 0
    flat: int = 0
    flat_characters: int = 0
    flat_lines: int = 0

    def skip(self, what: str, remedy: str) -> None:
        """Count a malformed row.

        Raises:
            UserError: one more than may be left out; it says what is wrong with this one.
        """
        if self.malformed == self.most_malformed:
            more = "--skip-malformed N leaves out up to N such rows"
            if self.most_malformed:
                more = f"--skip-malformed {self.most_malformed:,} were left out before"
            raise UserError(f"{what} — {remedy}; {more}")
        self.malformed += 1
        self.first_malformed = self.first_malformed or what

    def note(self, kind: str, what: str, count: int = 1) -> None:
        """Count what a reader should know of.

        Args:
            kind: one of NOTED.
            what: names the place.
        """
        self.noted[kind] += count
        self.first.setdefault(kind, what)

    def text_file(self, name: str, characters: int, blank: bool, ends: int, separators: Counter[str]) -> None:
        """Count a text file that was read.

        Args:
            blank: whether it has a blank line, or needs none.
            ends: of its lines.
            separators: of SEPARATORS on the first line.
        """
        if ends <= 1 and separators.total() >= LEAST_SEPARATORS:
            mark, count = separators.most_common(1)[0]
            self.note("separators", f"{name} with {count:,} {SEPARATORS[mark]}")
        elif not blank and characters >= FLAT_CHARACTERS:
            self.flat += 1
            self.flat_characters += characters
            self.flat_lines += ends > 1

    def notes(self) -> list[str]:
        """One line for each kind of row or file that a reader should know of."""
        said = []
        if self.malformed:
            said.append(
                f"{self.malformed:,} malformed rows left out, the first: {self.first_malformed} — mend them, or leave "
                "it so"
            )
        said += (NOTED[kind].format(count=count, first=self.first[kind]) for kind, count in self.noted.items())
        if rows := self.without_text + self.blank_text:
            both = f"{self.without_text:,} null, {self.blank_text:,} empty"
            which = both if self.without_text and self.blank_text else "null" if self.without_text else "empty"
            said.append(f"{rows:,} rows have no text ({which}) and are no documents")
        if self.empty:
            said.append(f"{self.empty:,} files hold no document")
        if self.flat:
            files = f"{self.flat:,} text files have" if self.flat > 1 else "the text file has"
            lines = "--documents lines takes each line as one, " if self.flat_lines else ""  # else it has one line
            said.append(
                f"{files} no blank line in {self.flat_characters:,} characters, so that each file is one document — "
                f"{lines}--documents files says that it is meant"
            )
        return said
