"""Convert models to and from Diffusers."""
