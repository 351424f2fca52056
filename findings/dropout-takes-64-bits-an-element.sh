#!/usr/bin/env bash
# On a CPU torch's dropout takes two numbers of its generator for each element, one after the other.
#
# To keep or drop an element is one bit. bernoulli_(p), and so dropout, takes 64 bits of the Mersenne Twister for it
# in every dtype, bool too; rand of the same size takes 32. The numbers are drawn in turn, so that dropout takes many
# times as long as the multiplication it ends in. bernoulli of a float32 tensor that is full of p takes 32 bits: the
# two ways to write one thing give other masks after the same seed.
#
# Expected: no more than rand takes, and the same mask from both.
#
# Seen with: torch 2.13.0 (CPU).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - <<'EOF'
import time
from statistics import median

import torch
from torch.nn.functional import dropout

N = 10_000
ones = torch.ones(N)


def draws(operation):
    """How many numbers of 32 bits an element takes: that many drawn by themselves leave the generator as it is."""
    torch.manual_seed(0)
    operation()
    after = torch.get_rng_state()
    for count in range(5):
        torch.manual_seed(0)
        torch.empty(count * N, dtype=torch.int32).random_()
        if torch.equal(torch.get_rng_state(), after):
            return count


def mask(operation):
    torch.manual_seed(0)
    return operation().int().tolist()


seen = {
    "rand": draws(lambda: torch.rand(N)),
    "bernoulli of a tensor": draws(lambda: torch.bernoulli(ones * 0.9)),
    "bernoulli_": draws(lambda: torch.empty(N).bernoulli_(0.9)),
    "bernoulli_ in bfloat16": draws(lambda: torch.empty(N, dtype=torch.bfloat16).bernoulli_(0.9)),
    "bernoulli_ in bool": draws(lambda: torch.empty(N, dtype=torch.bool).bernoulli_(0.9)),
    "dropout": draws(lambda: dropout(ones, 0.1)),
}
print("torch", torch.__version__)
for what, count in seen.items():
    print(f"{what}: {count} numbers of 32 bits an element")
one_half = mask(lambda: torch.empty(12).bernoulli_(0.5)), mask(lambda: torch.bernoulli(torch.full((12,), 0.5)))
print("after one seed: bernoulli_(0.5)", one_half[0], "bernoulli of 0.5", one_half[1])

torch.set_num_threads(1)
x, ratios = torch.ones(1 << 20), []
for _ in range(25):
    start = time.perf_counter()
    dropout(x, 0.1)
    middle = time.perf_counter()
    x * 2
    ratios.append((middle - start) / (time.perf_counter() - middle))
print(f"dropout takes {median(ratios):.0f} times as long as a multiplication, one thread, median of {len(ratios)}")
assert list(seen.values()) == [1, 1, 2, 2, 2, 2]
assert one_half[0] != one_half[1]
assert median(ratios) > 3
EOF
