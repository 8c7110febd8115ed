"""Rows of images and messages, and the files they come from."""
