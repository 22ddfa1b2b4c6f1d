"""Making a folder of images ready for training: one size, one format, without the damaged and the too small ones.

records.py    what is asked for, an image to make, what became of it
sources.py    which images there are: in a folder, in a data set
making.py     one image: read, check, scale, write
workers.py    many of them, in several processes that can be stopped
target.py     the folder that is made: the journal, what of it is still valid, what has to go
report.py     what was kept and dropped, and why
prepare.py    all of it, in order
"""
