"""The value model: a decoder's text part and the head on it."""
