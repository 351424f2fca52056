"""The exported folder as stock Hugging Face clients see it.

`tokens` and `check` compare its tokens and its logits with those of stock `transformers`, `modelcard` writes its
README, `demo` fills masks with it. `cramfast/export.py` is the command in front. Read `check.py` first.
"""
