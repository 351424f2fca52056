"""Pretrain a BERT-class encoder from raw text on one machine in one day."""
