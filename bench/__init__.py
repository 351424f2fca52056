"""Throughput of every operator and of the whole training step beside their peers."""
