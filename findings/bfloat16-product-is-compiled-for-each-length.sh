#!/usr/bin/env bash
# A bfloat16 product of torch on a CPU is compiled anew for each number of rows.
#
# torch hands it to oneDNN, which makes machine code for one shape and keeps it. Batches of ragged sentences without
# padding have a new number of tokens nearly every time, and each waits for a compiler, in plain eager mode. For a
# small model that takes longer than the product. Rows filled up to a multiple of 32 make it a few compilations.
#
# Expected: one compilation for a weight, whatever the number of rows.
#
# Seen with: torch 2.13.0 (CPU), oneDNN 3.12.0 in it. Needs an x86-64 processor with AVX-512, for which torch takes
# oneDNN.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1
grep -q avx512bw /proc/cpuinfo || { echo "not shown: this processor has no AVX-512" >&2; exit 1; }
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
for multiple in 1 32; do
    ONEDNN_VERBOSE=2 "$work/venv/bin/python" - "$multiple" >"$work/$multiple.txt" <<'EOF'
import sys

import torch

multiple = int(sys.argv[1])
torch.set_num_threads(1)
weight = torch.ones(256, 256, dtype=torch.bfloat16)
for _ in range(2):
    for rows in range(65, 129):
        torch.ones(-(-rows // multiple) * multiple, 256, dtype=torch.bfloat16) @ weight
EOF
done
"$work/venv/bin/python" - "$work/1.txt" "$work/32.txt" <<'EOF'
import re
import sys
from statistics import median

import torch

seen = []
for path, what in zip(sys.argv[1:], ("as many rows as tokens", "rows a multiple of 32")):
    text = open(path).read()
    if not seen:
        print("torch", torch.__version__, "with", re.search(r"oneDNN v[\d.]+", text)[0])
    times = {
        event: [float(ms) for ms in re.findall(rf"^onednn_verbose,.*,{event},cpu,matmul,.*,([\d.]+)$", text, re.M)]
        for event in ("create:cache_miss", "create:cache_hit", "exec")
    }
    made, found, ran = times.values()
    print(f"{what}: {len(ran)} products of 64 lengths, twice each: {len(made)} compilations, {len(found)} found again")
    print(f"  medians: compilation {median(made):.3f} ms, product {median(ran):.3f} ms")
    seen.append((len(ran), len(made)))
    if len(seen) == 1:
        assert median(made) > median(ran)
assert seen == [(128, 64), (128, 2)], seen
EOF
