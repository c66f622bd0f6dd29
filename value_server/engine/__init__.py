"""Many sessions, one forward pass: batches, the cache, attention."""
