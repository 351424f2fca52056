"""How good a model is: python -m cramfast.evaluate glue, task, blimp, perplexity, cola.

One file a subcommand: `glue`, `owntask`, `blimp`, `perplexity`, `cola`; `probe` is the quick look during training.
Models come from `checkpoints` (ours) or `stock` (any of `transformers`) as a `masked` model. `tasks` says what GLUE's
tasks are, `examples` reads them, `finetune` trains on one and `jobs` on many, `scores` judges; `results` writes what
was found, on the `machine` that was asked for. Others may import `probe` alone. Read `checkpoints.py` first.
"""
