"""Weights from Meta, timm and transformers, and back; what is wrong with a file."""
