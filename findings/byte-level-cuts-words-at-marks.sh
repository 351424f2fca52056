#!/usr/bin/env bash
# The byte-level pre-tokenizer of tokenizers cuts words at combining marks.
#
# Its pattern (GPT-2's) knows letters, digits and the rest; a vowel sign or an accent of its own is the rest. A
# Hindi, Tamil or vocalised Arabic word falls into four to seven pieces before any merge can be learned, and no
# vocabulary, however large, can join them. A Vietnamese word is one piece or three, by how its accents are encoded.
#
# Expected: a word without spaces, digits or punctuation is one piece.
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
from tokenizers import pre_tokenizers

split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
words = ("नमस्ते", "हिन्दी", "வணக்கம்", "مُحَمَّد", "Vi\u1ec7t", "Vie\u0323\u0302t")
seen = {word: [word[a:b] for _, (a, b) in split(word)] for word in words}
print("tokenizers", tokenizers.__version__)
for word, pieces in seen.items():
    print(f"{word}: {len(pieces)} pieces, {pieces}")
assert [len(pieces) for pieces in seen.values()] == [4, 6, 4, 7, 1, 3]
EOF
