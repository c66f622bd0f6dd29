"""Commands that answer one question each; the last line of each is JSON.

systems      what it costs, and whether it holds
evidence     what it is good for
report       tables and pages from the results of `evidence`
endpoint     many answers of one server; servers: a vLLM with its value server, which it asks
             (their command lines: lenvm_vllm/commands/servers.py)
estimates    means with intervals
provenance   what each final line says of commit, command, versions, machine, settings, servers
"""
