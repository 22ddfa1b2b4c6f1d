"""Convert models to and from Diffusers."""

from diffusion_core.diffusers_io.exporter import export_model
from diffusion_core.diffusers_io.importer import import_model
from diffusion_core.diffusers_io.layout import knob_problems, unet_config
from diffusion_core.diffusers_io.names import diffusers_name
from diffusion_core.diffusers_io.scheduler import scheduler_config
from diffusion_core.diffusers_io.source import CLASSES_FILE

__all__ = [
    "CLASSES_FILE",
    "diffusers_name",
    "export_model",
    "import_model",
    "knob_problems",
    "scheduler_config",
    "unet_config",
]
