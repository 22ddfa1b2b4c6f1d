"""Feature networks: Inception-v3, EfficientNet-Lite0, and networks in files of the user."""
