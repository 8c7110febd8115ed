"""Pictures of text, with what they say."""
