"""Prepare a folder of images for training: decode, check, scale, and write every image in one size and format.

records.py    settings, jobs, results
sources.py    find the images of a folder or of a data set
image.py      prepare one image
workers.py    prepare many images in several processes
target.py     the target folder and its journal
prepare.py    run all steps in order
report.py     report which images were kept and dropped, and why
"""

from diffusion_core.data.preparation.prepare import prepare
from diffusion_core.data.preparation.records import DATA_SETS, InputError, Settings
from diffusion_core.data.preparation.report import describe
from diffusion_core.data.preparation.sources import SUFFIXES, find_images
from diffusion_core.data.preparation.target import REPORT_FILE, check_target

__all__ = [
    "DATA_SETS",
    "REPORT_FILE",
    "SUFFIXES",
    "InputError",
    "Settings",
    "check_target",
    "describe",
    "find_images",
    "prepare",
]
