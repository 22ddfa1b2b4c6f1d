"""Figures of a model's quality. Only a Fréchet distance in published Inception features is called FID.

``folders`` and ``generated`` yield uint8 images. ``extractors`` and ``classifier`` compute their ``features``.
``measure`` makes one pass over the images. ``distances`` compares features with those of a ``reference``. ``suite``
combines these as a configuration asks.
"""
