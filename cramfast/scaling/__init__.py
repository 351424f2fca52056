"""The scaling law of this machine and text: python -m cramfast.scaling run, fit, claims, report.

A `plan` is a list of runs; `run` does them with `runner`, and keeps a `table` of their results. `law` and `optimum` are
the formula, `fit` finds its numbers, `shift` checks that curves of all sizes collapse. `claims` turns each throughput
gain off in turn (`switches`, `switched`, `stepper`) to see what it buys; `report` and `plots` show it all. Others may
import nothing. Read `law.py` first.
"""
