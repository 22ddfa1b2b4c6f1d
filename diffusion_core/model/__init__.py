"""The network: its layers, its widths, its cost, its compilation."""
