"""Self-contained experiments that train small models, on questions that the paper leaves open."""
