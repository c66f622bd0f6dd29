"""What the plugin, the server and the trainer agree on. Imports nothing else of this project."""
