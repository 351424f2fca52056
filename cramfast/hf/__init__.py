"""The exported folder as stock Hugging Face clients see it.

`check` compares its logits with those of stock `transformers`, `tokens` what AutoTokenizer makes of a text with what
training made of it; `modelcard` writes its README, `demo` fills masks with it. `cramfast/export.py` is the command in
front. Others may import every file. Read `check.py` first.
"""
