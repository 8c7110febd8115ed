"""Vision towers of transformers on packed attention: models that are built already."""
