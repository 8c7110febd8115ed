"""`hrvlm embed`: whether the encoder waits, and whether memory grows."""
