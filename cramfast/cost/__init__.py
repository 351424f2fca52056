"""What a run will cost before it is begun: time, memory, loss.

`roofline` counts operations and bytes of our kernels, `counted` those of stock PyTorch, `cards` says what a card can do
at most, `calibration` measures this machine, `measurements` reads what a card has shown, `footprint` adds up memory,
`losslaw` expects a loss, and `forecast` puts them into one answer. `cramfast.plan` is the command in front.
Others may import every file. Read `forecast.py` first.
"""
