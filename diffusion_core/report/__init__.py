"""Reports: what a sweep, a chain of tickets or some runs found, as one page of HTML or as Markdown.

:mod:`folders` reads run folders into a :class:`study.Study`; everything else works on that plain data.
"""
