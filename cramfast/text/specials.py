"""The special tokens and their ids, the same in every tokenizer."""

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(5)
FIRST_WORD = len(SPECIAL_TOKENS)
