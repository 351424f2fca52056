#!/usr/bin/env bash
# lzma of Python ends at padding between two xz streams, without an error.
#
# The xz format allows zeros, a multiple of four bytes, between streams (tools that write volumes or append leave
# them); the command xz, tried in 5.4.1, reads on behind them. lzma.open returns what stands in the first stream, as
# if the file ended there. Half of a corpus is gone, and nothing says so. lzma is a part of Python, so there is no
# package to pin: the script runs python3, or each interpreter that is given to it, and names their versions.
#
# Expected: both texts.
#
# Seen with: the lzma module of Python 3.6.15, 3.7.16, 3.8.18, 3.9.18, 3.10.13, 3.11.7, 3.12.1 and 3.13.0.
set -euo pipefail
[ $# -gt 0 ] || set -- python3
for python in "$@"; do
    "$python" - <<'EOF'
import io
import lzma
import platform

one, two = lzma.compress(b"first\n"), lzma.compress(b"second\n")
seen = {zeros: lzma.open(io.BytesIO(one + bytes(zeros) + two)).read() for zeros in (0, 4, 8)}
print("Python", platform.python_version())
for between, text in seen.items():
    print("zeros between the streams: {} -> {}".format(between, text))
if seen != {0: b"first\nsecond\n", 4: b"first\n", 8: b"first\n"}:
    raise SystemExit("the behaviour has changed in Python " + platform.python_version())
EOF
done
