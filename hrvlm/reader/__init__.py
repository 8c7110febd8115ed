"""The small model in the wheel that reads drawn text."""
