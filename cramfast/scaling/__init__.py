"""The scaling law of this machine and text: runs, fits, checks of what each throughput gain buys, pages about it."""
