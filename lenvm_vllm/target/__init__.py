"""What a request asks for, and whether it can have it."""
