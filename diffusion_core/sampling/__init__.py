"""From noise to images, and to files of images."""
