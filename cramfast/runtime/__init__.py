"""This process and the machine below it, without a word about models or text.

Signals (`interrupt`), other processes of the same run (`distributed`), files that are whole or absent (`atomic`) and
JSON in them (`jsonfile`), time (`stopwatch`), the terminal (`progress`, `output`) and the words that were typed
there (`arguments`), names on a profiler's timeline (`ranges`), the `allocator`, and random numbers by place
(`counter_random`). Others may import every file; this room imports `errors` alone. Read `distributed.py` first: its
`Team` is handed through the whole trainer.
"""
