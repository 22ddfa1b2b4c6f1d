"""What commands show in a terminal: help that fits its width, and the progress of long work."""
