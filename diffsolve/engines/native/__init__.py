"""The native engine: a right-hand side traced, differentiated and compiled to machine code."""
