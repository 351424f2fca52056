#!/usr/bin/env bash
# lzma of Python ends at padding between two xz streams, without an error.
#
# The xz format allows zeros, a multiple of four bytes, between streams (tools that write volumes or append leave
# them); the command xz reads on behind them. lzma.open returns what stands in the first stream, as if the file ended
# there. Half of a corpus is gone, and nothing says so.
#
# Expected: both texts.
#
# Seen with: the lzma module of Python 3.11.7.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/python" - <<'EOF'
import io
import lzma
import platform

one, two = lzma.compress(b"first\n"), lzma.compress(b"second\n")
seen = {zeros: lzma.open(io.BytesIO(one + bytes(zeros) + two)).read() for zeros in (0, 4, 8)}
print("Python", platform.python_version())
for between, text in seen.items():
    print(f"between the streams: {between} -> {text}")
assert seen == {0: b"first\nsecond\n", 4: b"first\n", 8: b"first\n"}
EOF
