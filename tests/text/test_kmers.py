"""K-mers: the cutting is that of the stock tokenizer, whatever the lines and the case of a sequence."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cramfast.errors import UserError
from cramfast.text.kmers import AMINO_ACIDS, NUCLEOTIDES, Kmers
from cramfast.text.lost import lost_characters
from cramfast.text.specials import FIRST_WORD, SPECIAL_TOKENS
from cramfast.text.tokenizer import train_tokenizer
from cramfast.text.wordcache import WordCache

SEQUENCE = st.text(alphabet=st.sampled_from("acgtACGTuNn \n-*5é"), max_size=60)


CUTTINGS = [Kmers(letters, k, overlapping) for letters, k, overlapping in
            ((NUCLEOTIDES, 1, False), (NUCLEOTIDES, 3, False), (NUCLEOTIDES, 2, True), (NUCLEOTIDES, 4, True),
             (AMINO_ACIDS, 1, False), (AMINO_ACIDS, 2, True))]  # fmt: skip


@pytest.mark.parametrize("kmers", CUTTINGS, ids=str)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(SEQUENCE, max_size=4))
def test_kmers_are_those_of_the_stock_tokenizer(kmers, texts):
    tokenizer = kmers.tokenizer()
    assert Kmers.of(tokenizer) == kmers
    ids, lengths = WordCache(tokenizer).encode(texts)
    plain = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert lengths.tolist() == list(map(len, plain)) and ids.tolist() == [i for row in plain for i in row]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("kmer", "ACGTACGTAC", ["acgtac", "g", "t", "a", "c"]),
        ("kmer:3", "acg TAN\nUcg", ["acg", "t", "a", "n", "tcg"]),
        ("kmer:3:overlapping", "ACGTANACCC", ["acg", "cgt", "gta", "n", "acc", "ccc"]),
        ("kmer:3:overlapping", "AC", ["a", "c"]),
    ],
)
def test_kmers_of_a_sequence_whatever_its_lines_and_its_case(name, text, expected):
    tokenizer = train_tokenizer(["ACGTN" * 100], name, 512)
    assert tokenizer.encode(text).tokens == ["[CLS]", *expected, "[SEP]"]
    assert [tokenizer.id_to_token(i) for i in range(FIRST_WORD)] == list(SPECIAL_TOKENS)
    assert tokenizer.get_vocab_size() % 64 == 0
    assert lost_characters(tokenizer, ["ACGT-N*", "é5"]).counts == {"é": 1, "5": 1}


def test_kmers_that_no_vocabulary_holds_are_refused_and_proteins_are_single_letters():
    with pytest.raises(UserError, match=r"kmer:6' has 64,000,000 entries for 20 letters — use kmer:4 or less"):
        train_tokenizer(["MKVLAAGWERTY"], "kmer:6", 512)
    assert train_tokenizer(["MKVLAAGWERTY"], "kmer", 512).encode("MKV").tokens == ["[CLS]", "m", "k", "v", "[SEP]"]
