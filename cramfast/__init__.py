"""Pretrain a BERT-class encoder from raw text on one machine in one day."""

import signal
import sys

from cramfast.errors import leave_at_once

if sys.argv[:1] == ["-m"]:  # `python -m cramfast.NAME`, which goes on to import torch for seconds; not yet in command()
    signal.signal(signal.SIGINT, leave_at_once)
    signal.signal(signal.SIGTERM, leave_at_once)
