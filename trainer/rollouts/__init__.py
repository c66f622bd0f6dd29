"""Samples of prompts: the only labels a value model needs."""
