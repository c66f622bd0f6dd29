"""In vLLM's API server: what a request and its answer pass through."""
