"""Pretrain a BERT-class encoder from raw text on one machine in one day."""

import signal
import sys

from cramfast.errors import leave_at_once

# `python -m cramfast.NAME` goes on to import torch for seconds, before errors.command(); the console command takes care
# of itself in __main__.py.
if sys.argv[:1] == ["-m"]:
    signal.signal(signal.SIGINT, leave_at_once)
    signal.signal(signal.SIGTERM, leave_at_once)
