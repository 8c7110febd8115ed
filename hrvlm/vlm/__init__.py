"""From visual tokens to a language model: config, projector, processor, model."""
