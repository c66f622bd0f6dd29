"""What the plugin, the server and the trainer agree on. Imports nothing else of this project.

values.py       what a value is, and the length that it stands for
targets.py      what a head's output reads as
checkpoint.py   what a checkpoint holds
weights.py      whether two copies of a model have the same weights
wire.py         messages between plugin and server
units.py        what a word and a character are
listen.py       whether a server can listen at an address
tokens.py       bearer tokens in a file
"""
