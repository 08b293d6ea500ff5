"""Where a solve runs."""
