"""What the engine tells the API server, by files mapped into memory.

metrics      counts, shown on vLLM's /metrics
progress     how far each text is
"""
