"""Which code ran in a trace, and what that code depends on besides its arguments."""
