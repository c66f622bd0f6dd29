"""Talks to value servers.

client       one server: a call, and the circuit breaker
replicas     several as one, each with a thread of its own, and the search for a lost one
patience     how long one's answer is waited for
endpoint     how any of them is reached; traces: a span for each call
"""
