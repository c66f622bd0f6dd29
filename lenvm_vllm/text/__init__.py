"""The served model's tokens as text: parts, sentences, words, characters."""
