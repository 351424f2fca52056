#!/usr/bin/env bash
# add_prefix_space=True is taken by AutoTokenizer and changes nothing in a byte-level tokenizer.json.
#
# Scripts for named entities give words one by one (is_split_into_words=True) and pass add_prefix_space=True, so that
# a word gets the pieces that it has inside a sentence. For a folder of tokenizer.json with the generic class, both
# calls give other pieces than the sentence, with and without the flag, and without a warning.
#
# Expected: "dose" alone and "dose" in "the dose of" get equal pieces under add_prefix_space=True, or an error.
#
# Seen with: transformers 5.24.0, tokenizers 0.23.3.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6
"$work/venv/bin/python" - <<'EOF'
import json
import tempfile
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

made = Tokenizer(models.BPE())
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
made.train_from_iterator(["the dose of the drug was given to the patient"] * 50, trainer)
with tempfile.TemporaryDirectory() as folder:
    made.save(f"{folder}/tokenizer.json")
    Path(folder, "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    seen = []
    for flag in (False, True):
        tokenizer = AutoTokenizer.from_pretrained(folder, add_prefix_space=flag)
        words = tokenizer(["the", "dose", "of"], is_split_into_words=True).tokens()
        seen.append((tokenizer.tokenize("the dose of"), words))
print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
for flag, (sentence, words) in zip((False, True), seen):
    print(f"add_prefix_space={flag}: sentence {sentence}, words {words}")
assert seen[0] == seen[1] and seen[1][0] != seen[1][1]
assert len(seen[1][0]) == 3 < len(seen[1][1])
EOF
