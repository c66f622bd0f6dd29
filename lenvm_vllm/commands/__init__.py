"""The `lenvm` command."""
