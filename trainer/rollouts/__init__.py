"""Samples of prompts: the only labels a value model needs.

rollout      the command; shards: its files
prompts      from files and data sets; pictured: their pictures; samplers: vLLM, or a server
import_logs  the command for production logs
logs         their forms; turns: the texts in them; encoding: as token ids; reader: as rows
lengths      how long the samples are
"""
