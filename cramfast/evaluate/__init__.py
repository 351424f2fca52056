"""How good a model is: held-out perplexity, GLUE and own tasks by fine-tuning, BLiMP: python -m cramfast.evaluate."""
