"""What one reading of the text met that is no text: counted, to be said at its end."""

from dataclasses import dataclass

from cramfast.errors import UserError

FLAT_CHARACTERS = 10_000  # of a text file without a blank line, from which it is hardly one document


@dataclass
class Tally:
    """Attributes:
    most_malformed: rows that may be left out; the next one is an error.
    malformed: rows that were left out, the first of them at `first_malformed`.
    swallowed: cells of many lines that look like rows, the first of them at `first_swallowed`.
    without_text: rows whose text is null.
    empty: files without any document.
    flat: text files of some length without a blank line, with `flat_characters` in all.
    """

    most_malformed: int = 0
    malformed: int = 0
    first_malformed: str = ""
    swallowed: int = 0
    first_swallowed: str = ""
    without_text: int = 0
    empty: int = 0
    flat: int = 0
    flat_characters: int = 0

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

    def swallow(self, what: str) -> None:
        """Count a cell that may hold rows of its own."""
        self.swallowed += 1
        self.first_swallowed = self.first_swallowed or what

    def text_file(self, characters: int, blank: bool) -> None:
        """Count a text file that was read in blocks between blank lines."""
        if not blank and characters >= FLAT_CHARACTERS:
            self.flat += 1
            self.flat_characters += characters

    def notes(self) -> list[str]:
        """One line for each kind of row or file that a reader should know of."""
        said = []
        if self.malformed:
            said.append(
                f"{self.malformed:,} malformed rows left out, the first: {self.first_malformed} — mend them, or leave "
                "it so"
            )
        if self.swallowed:
            said.append(
                f"{self.swallowed:,} cells may hold many rows each, the first: {self.first_swallowed} — see whether a "
                "quote there is closed too late"
            )
        if self.without_text:
            said.append(f"{self.without_text:,} rows have no text (null) and are no documents")
        if self.empty:
            said.append(f"{self.empty:,} files hold no document")
        if self.flat:
            files = f"{self.flat:,} text files have" if self.flat > 1 else "the text file has"
            said.append(
                f"{files} no blank line in {self.flat_characters:,} characters, so that each file is one document — "
                "--documents lines takes each line as one, --documents files says that it is meant"
            )
        return said
