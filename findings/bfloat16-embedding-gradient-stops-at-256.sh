#!/usr/bin/env bash
# On a CPU torch adds up bfloat16 gradients of an embedding in bfloat16: a sum of ones stops at 256.
#
# A word that occurs 5,000 times in a batch gets a gradient of 256 where each occurrence adds 1, because 256 + 1 is
# 256 in bfloat16. index_add_ does the same; scatter_add_ and sum of the same numbers keep float32 sums and round
# once. The commonest words of a text, whose embeddings matter most, are trained with a gradient that is many times
# too small.
#
# Expected: 4992, which is 5,000 in bfloat16, from all of them.
#
# Seen with: torch 2.13.0 (CPU).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - <<'EOF'
import torch

places, ones = torch.zeros(5000, dtype=torch.long), torch.ones(5000, dtype=torch.bfloat16)
table = torch.nn.Embedding(2, 1).bfloat16()
table(places).sum().backward()
seen = {
    "gradient of an embedding": table.weight.grad[0].item(),
    "index_add_": torch.zeros(1, dtype=torch.bfloat16).index_add_(0, places, ones).item(),
    "scatter_add_": torch.zeros(1, dtype=torch.bfloat16).scatter_add_(0, places, ones).item(),
    "sum": ones.sum().item(),
}
print("torch", torch.__version__)
for what, value in seen.items():
    print(f"{what}: {value:.0f}")
assert list(seen.values()) == [256, 256, 4992, 4992]
EOF
