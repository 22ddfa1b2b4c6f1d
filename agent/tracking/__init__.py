"""Everything that talks to Weights & Biases; nothing else imports its client."""
