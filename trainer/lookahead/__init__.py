"""Exact values after the served model's likeliest next tokens.

distil       the command: writes them for a lookahead head to learn
served       which tokens the served model would put next; exact: their values, by a forward pass
"""
