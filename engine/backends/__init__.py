"""Where inference runs."""
