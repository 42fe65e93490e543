"""A model behind HTTP: batching, tokenising and the wire formats of other servers."""
