"""Features of very many images: a resumable run on Ray Data, and a search among what it wrote."""
