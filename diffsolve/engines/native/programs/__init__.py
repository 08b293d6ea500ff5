"""Right-hand sides as machine code, and how they are found again."""
