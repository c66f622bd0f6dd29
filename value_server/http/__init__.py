"""The routes, and what stands in front of them."""
