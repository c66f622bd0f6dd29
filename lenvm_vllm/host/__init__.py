"""What the plugin leans on: names of vLLM's, and the machine."""
