"""The value server: a small model that scores how many tokens are still to come."""
