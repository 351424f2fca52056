"""Which tokenizer a text gets, what it was not taught, and what it loses: each said in one line, or refused."""

from tokenizers import Tokenizer

from cramfast.errors import UserError
from cramfast.text.census import Census
from cramfast.text.learning import Learned
from cramfast.text.lost import Lost, described, percent, suitable
from cramfast.text.survey import Survey
from cramfast.text.tokenizer import train_tokenizer

# What a tokenizer has no token for vanishes without a trace in the loss, so it is counted; one sign may turn a sentence
# round, so all of it is said, however rare.
LOST_REFUSED = 0.5


def choose(asked: str, census: Census) -> tuple[str, str]:
    """(the tokenizer that was asked for or that auto takes, what is to be said of it, unless it is the usual)."""
    if asked != "auto":
        return asked, ""
    kind, why = suitable(census)
    if kind == "wordpiece":
        return kind, ""
    return kind, (
        f"--tokenizer auto takes {kind}, which keeps case and all of Unicode: {why}; --tokenizer wordpiece is the "
        "other, kmer is for DNA and proteins"
    )


def learn(survey: Survey, kind: str, vocab_size: int, source: str) -> tuple[Tokenizer, list[str]]:
    """A tokenizer learned from the survey's sample, and what is to be said of it."""
    learned, said = Learned(), []
    tokenizer = train_tokenizer(survey.texts(), kind, vocab_size, learned)
    if left_out := learned.note():
        said.append(
            f"{source}: the tokenizer did not learn from all of its sample, left out were {left_out}; training reads "
            "them all the same"
        )
    if kind.endswith(":overlapping"):
        said.append(
            "the letters of an overlapping k-mer stand in its neighbours, from which a hidden one can be read; "
            f"--tokenizer {kind.removesuffix(':overlapping')} has none of this"
        )
    return tokenizer, said


def check_lost(lost: Lost, kind: str, source: str) -> str:
    """A line about the characters without a token, if there are any; else nothing.

    Raises:
        UserError: more than LOST_REFUSED of them.
    """
    commonest = ", ".join(described(*each) for each in lost.commonest())
    what = f"{source}: {percent(lost.share)} of the characters have no token in {kind} ({commonest})"
    remedy = "--tokenizer bpe has one for every character"
    if lost.share > LOST_REFUSED:
        raise UserError(f"{what} — {remedy}")
    return f"{what}; {remedy}" if lost.counts else ""
