#!/usr/bin/env bash
# backports.zstd refuses valid files with a large window, and calls it too much memory.
#
# The dumps of large corpora are written with --long=31. Compressing with a window above 128 MiB is allowed without a
# word; reading the file back needs the same number said again, or ends with an error that speaks of memory, though
# five kilobytes are all that has to be held.
#
# Expected: what the library writes by its options, it reads without any.
#
# Seen with: backports.zstd 1.8.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HUB_OFFLINE=1
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q backports.zstd==1.8.0
"$work/venv/bin/python" - <<'EOF'
import importlib.metadata
import io

from backports import zstd

text = b"text " * 1000
options = {zstd.CompressionParameter.window_log: 28, zstd.CompressionParameter.enable_long_distance_matching: 1}
compressor = zstd.ZstdCompressor(options=options)
packed = compressor.compress(text) + compressor.flush()
print("backports.zstd", importlib.metadata.version("backports.zstd"), f"{len(text):,} bytes in {len(packed):,}")
try:
    zstd.open(io.BytesIO(packed)).read()
except zstd.ZstdError as error:
    print("read back:", error)
    assert "too much memory" in str(error)
else:
    raise SystemExit("it is read: the behaviour has changed")
wide = {zstd.DecompressionParameter.window_log_max: 31}
assert zstd.open(io.BytesIO(packed), options=wide).read() == text
print("read back with window_log_max 31: whole")
EOF
