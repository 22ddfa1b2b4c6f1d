"""What a sweep file says without its trials: which values are tried, by which engine, by which command."""
