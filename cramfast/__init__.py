"""Pretrain a BERT-class encoder from raw text on one machine in one day."""

import signal
import sys

from cramfast.errors import leave_at_once, stop_signals

# `python -m cramfast.NAME` goes on to import torch for seconds, before errors.command(); the console command takes care
# of itself in __main__.py.
if sys.argv[:1] == ["-m"]:
    for number in stop_signals():
        signal.signal(number, leave_at_once)
