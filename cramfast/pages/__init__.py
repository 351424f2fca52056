"""What is shown to people: HTML pages that need no network (`page`), charts in SVG (`charts`), tables of scores
(`scoretable`), numbers in words (`numbers`).

Everything that prints or writes a report may import from here; nothing here knows what a run is. Read `page.py` first.
"""
