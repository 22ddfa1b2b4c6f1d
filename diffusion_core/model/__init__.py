"""The network: layers, widths, cost, and compilation."""
