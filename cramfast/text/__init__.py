"""From files of any kind to token ids on disk.

In the order of the work:

- `corpus` makes documents of `files` (but for `copies`, what is no data in folders that were `saved`, and what its
  `magic` shows to be of another kind): through `compressed` archives, text in `lines` (and in other `encodings`), rows
  of `records`, `delimited` values and `tables`, sequences by `fasta`, `wikiextractor`'s articles, datasets of the
  `hub`; a `tally` counts what was left out. `docstrings` finds a text where none was given.
- `survey` looks at the text once; `curation` (with `minhash`) drops what was asked to be dropped.
- `census` counts characters, `tokenizerchoice` takes a `tokenizer` for them (with `specials`, `spelling`, `bytebpe`,
  `kmers`) or a `giventokenizer`; `learning` picks what it learns from, `lost` counts what it loses.
- `splits` (by `units`) takes the held-out part and writes ids (with `wordpieces`, `wordcache`), `said` is what a user
  should know of it, `prepared` is the folder that holds all, `report` shows it.

No file here knows a model. Others may import every file but `bytebpe`, `fasta`, `learning`, `minhash`, `records`,
`spelling`, `tables`, `units`, `wikiextractor` and `wordpieces`. Read `corpus.py` first.
"""
