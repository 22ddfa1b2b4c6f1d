"""All communication with Weights & Biases. No other folder imports its client."""
