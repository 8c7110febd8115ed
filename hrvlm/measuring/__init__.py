"""Times, of rivals that take turns."""
