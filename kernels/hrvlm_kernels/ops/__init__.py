"""The ops: formula, checks, shapes and gradient of each. They need torch alone."""
