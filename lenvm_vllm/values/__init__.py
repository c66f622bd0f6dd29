"""Talks to value servers."""
