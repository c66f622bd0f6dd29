"""What the engine tells the API server: counts, and how far each text is."""
