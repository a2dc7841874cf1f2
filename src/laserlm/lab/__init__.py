"""Self-contained experiments on questions that the paper leaves open."""
