"""Talks to value servers.

client       one server: a call a step, and the circuit breaker
replicas     several as one, and the search for a lost one
endpoint     how any of them is reached; traces: a span for each call
"""
