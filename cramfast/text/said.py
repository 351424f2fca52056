"""What is to be said, or refused, of a text that was prepared: its vocabulary and the two sides of its split."""

from tokenizers import Tokenizer

from cramfast.errors import UserError, note
from cramfast.text.curation import Curator
from cramfast.text.splits import SplitWriter
from cramfast.text.survey import Survey
from cramfast.text.tokenizer import word_count

BOUNDS = (0.75, 1.25)  # of the tokens to hold out: outside it is said
# A text of so many characters for each entry asked for has words enough for at least half of them.
CHARACTERS_PER_ENTRY = 100
LARGE_TEXT = 1_000_000  # characters; a smaller one may well have few words

SHARED = (
    "the text repeats itself so much that what is held out stands in training too, and its loss says little — "
    "--documents lines with --curation.duplicates exact keeps each line once"
)


class Notes(list[str]):
    """What a reader of the text should know of: said at once, and kept for the manifest."""

    def say(self, *lines: str) -> None:
        for line in filter(None, lines):
            note(line)
            self.append(line)


def few_entries(source: str, tokenizer: Tokenizer, survey: Survey, vocab_size: int) -> str:
    """A line where a large text yields a vocabulary far below what was asked for; else nothing."""
    entries = word_count(tokenizer)
    if 2 * entries > vocab_size or survey.characters < max(CHARACTERS_PER_ENTRY * vocab_size, LARGE_TEXT):
        return ""
    return (
        f"{source}: a vocabulary of {entries:,} entries where vocab_size={vocab_size} was asked, from "
        f"{survey.characters:,} characters: the text repeats few words or letters — see that it is what you mean"
    )


def check_splits(
    source: str,
    writers: dict[str, SplitWriter],
    survey: Survey,
    curator: Curator,
    tokenizer: str,
    heldout_fraction: float,
) -> list[str]:
    """What is to be said of the two sides.

    Raises:
        UserError: no token on one of them.
    """
    empty, kept = sum(writer.empty for writer in writers.values()), survey.documents
    tokens, heldout = sum(writer.tokens for writer in writers.values()), writers["heldout"].tokens
    without = f"{empty:,} of {kept:,} documents have no token in {tokenizer}"
    if heldout in (0, tokens):
        dropped = sum(each.documents for each in curator.dropped.values())
        causes = [without] * (empty > 0) + [f"--curation dropped {dropped:,} of {len(curator.verdicts):,}"] * (
            dropped > 0
        )
        remedies = ["add documents"] + ["loosen --curation"] * (dropped > 0)
        if empty and tokenizer != "bpe":
            remedies.append("use --tokenizer bpe, which has a token for every character")
        raise UserError(
            f"{source}: too little text to train on and to hold out ({'; '.join(causes) or f'{tokens:,} tokens'}) — "
            + ", or ".join(remedies)
        )
    said = [
        share_note(survey, heldout_fraction, tokens, heldout),
        f"{without} and are not counted" if empty else "",
        SHARED if survey.shares_text else "",
    ]
    return [f"{source}: {line}" for line in said if line]


def share_note(survey: Survey, asked: float, tokens: int, heldout: int) -> str:
    """A line where another share of the tokens is held out than was asked for, with the reason; else nothing."""
    share = heldout / tokens
    low, high = (bound * asked for bound in BOUNDS)
    if low <= share <= high:
        return ""
    said = f"{share:.3g} of the tokens are held out ({heldout:,} of {tokens:,}) where heldout_fraction={asked:g}"
    if BOUNDS[0] * survey.wanted <= share <= BOUNDS[1] * survey.wanted:
        return f"{said}: so small a text holds out more, for a loss that tells runs apart — add text to hold out less"
    if survey.repeated > 0.5:
        return (
            f"{said}: {survey.repeated:.1%} of the text are one and the same, which stays on one side — "
            "--curation.duplicates exact keeps one copy"
        )
    return f"{said}: the text has {survey.documents:,} documents, too few or too short to cut — add text"
