"""Samples of prompts: the only labels a value model needs.

rollout      the command; shards: its files
prompts      from files and data sets; samplers: vLLM, or a server
lengths      how long the samples are
"""
