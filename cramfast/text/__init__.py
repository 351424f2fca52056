"""From files of any kind to token ids on disk.

In the order of the work: `corpus` makes documents of `files`, through `compressed` archives, text in `lines`, rows of
`records` and `tables`, `wikiextractor`'s articles and datasets of the `hub`, and a `tally` of what was left out;
`docstrings` finds a text where none was given. `survey` looks at it once, `curation` (with `minhash`) drops what was
asked to be dropped, `tokenizer` (or `giventokenizer`) learns pieces, `splits` (by `units`) takes the held-out part and
writes ids (with `wordpieces`, `wordcache`), `said` is what a user should know of it, `prepared` is the folder that
holds all, `report` shows it. No file here knows a model. Read `corpus.py` first.
"""
