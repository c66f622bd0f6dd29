"""Talks to value servers.

client       one server: a call, and the circuit breaker
replicas     several as one, each with a thread of its own, and the search for a lost one
replica      one of them, and the message that is out to it
patience     how long one's answer is waited for
pictures     gives pictures to servers whose models see them, from the API server
lookahead    values after any next token, where a server has a lookahead head
endpoint     how any of them is reached; traces: a span for each call
"""
