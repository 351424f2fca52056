"""From files of any kind to token ids on disk.

In the order of the work: `survey` and `corpus` read documents, of sequences by `fasta`; `docstrings` finds a text where
none was given, `curation` (with `minhash`) drops what was asked to be dropped, `splits` takes the held-out part,
`census` counts characters and `lost` those that a tokenizer loses, `learning` picks what one learns from, `tokenizer`
(with `specials`, `spelling`, `bytebpe`, `kmers`, `wordpieces`, `wordcache`) learns pieces and writes ids, `prepared` is
the folder that holds them, `report` shows it. No file here knows a model. Read `corpus.py` first.
"""
