"""What is shown to people: HTML pages that need no network, charts in SVG, tables of scores, numbers in words.

Everything that prints or writes a report may import from here; nothing here knows what a run is. Read `page.py` first.
"""
