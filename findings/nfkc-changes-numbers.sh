#!/usr/bin/env bash
# The NFKC step of many stock tokenizers changes the numbers of a text.
#
# NFKC, or a map made of it, stands in the tokenizers of XLM-RoBERTa and T5. It writes a raised figure beside its
# neighbours: ten to the minus six becomes 10 minus 6. A mixed number loses the gap before its fraction: two and a
# half becomes twenty-one halves. Both are valid by Unicode, and neither can be told from another number afterwards;
# for doses and units that matters.
#
# Expected by a reader: the same number after normalising.
#
# Seen with: tokenizers 0.22.2.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q tokenizers==0.22.2
"$work/venv/bin/python" - <<'EOF'
import tokenizers
from tokenizers import normalizers

written = ("10\u207b\u2076", "2\u00bd", "H\u2082O")
seen = {text: normalizers.NFKC().normalize_str(text) for text in written}
print("tokenizers", tokenizers.__version__)
for text, made in seen.items():
    print(f"{text} -> {made}")
assert list(seen.values()) == ["10\u22126", "21\u20442", "H2O"]
EOF
