"""Sample images from noise, and write image files."""
