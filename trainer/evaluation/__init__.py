"""How well a value model predicts."""
