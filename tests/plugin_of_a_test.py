"""A plugin that adds nothing."""
