"""In vLLM's engine: what each step does to the guided requests."""
