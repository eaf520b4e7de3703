"""Pages to look at in a browser: one self-contained HTML file each, that loads nothing and runs nothing.

Nothing in here knows what a page is about.
"""
