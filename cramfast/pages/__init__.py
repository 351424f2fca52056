"""What is shown to people: HTML pages that need no network (`page`), charts in SVG (`charts`), tables of scores
(`scoretable`), numbers in words (`numbers`).

Nothing here knows what a run is. Others may import every file. Read `page.py` first.
"""
