"""From token ids on disk to packed, masked microbatches of one static shape on the device.

`pack` decides which chunks share a microbatch and which tokens are predicted, `loader` reads and fills them beside the
computation, `feed` uploads them and hands them to the loop. Others may import every file. Read `pack.py` first.
"""
