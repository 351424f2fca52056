"""Which implementations a run may take on this very card: tried here, once, before training.

`candidates` says what is tried, `regime` makes inputs as training has them, `guard` the memory around them, `judge`
compares with float64, `timing` with the floor of stock PyTorch; `child` does all that in a process of its own, which
`process` starts, listens to and ends. `agreement` runs a whole microbatch both ways, before training and, by `watch`,
again in it. `verdict` is what comes of it, `cache` keeps it, `trial` leads from the one to the other, and `resolve` is
what a run calls. Others may import `resolve`, `verdict` and `watch`. Read `resolve.py` first, then `judge.py`.
"""
