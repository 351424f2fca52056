"""One run in time: what it has spent, what it has written, and how it goes on after a kill.

`microbatch` is the forward and backward pass of one batch, `ledger` counts it against the `budget`, `checkpoint` and
`runfolder` keep it, `metrics` writes its rows, `record` reads them and `summary` says what matters, `memory` looks for
the microbatch that fits, `kernelchoice` names the operators it uses, `profiling` looks at it. The loop itself is
`cramfast/train.py`. Others may import every file. Read `ledger.py` first.
"""
