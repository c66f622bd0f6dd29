"""Many sessions, one forward pass.

job.py               what is asked: a job is one request, with a row for each session
batcher.py           how the server batches: jobs wait, go pass by pass together, and are answered
scheduler.py         which tokens of which rows go into the next pass
pace.py              how much goes into it
limits.py            what no state of the server could answer
tree.py              the slots, as a tree of tokens; texts that begin alike share theirs
session.py           a text that has slots
pictures.py          the pictures that are held, by digest
shown.py             where in a text its pictures are
showing.py           from placeholders of a row to slots of its pictures, and into the passes
cache.py             which texts have slots
line.py              who may come in where not all have room
engine.py            a pass: rows → backbone → head → logits
shares.py            what the rows have of a pass, as arrays
heads.py             what the heads made of each slot, and rows that read theirs
attention.py         attention of a pass over the slots, in groups of rows
triton_attention.py  the same on a GPU, by kernels of ours
graphs.py            passes as CUDA graphs
linear.py            linear layers for passes of a few rows
keys.py              what lookahead multiplies its queries with: k of all tokens
memory.py            keys and values of the slots, and the way to the device
selfcheck.py         whether a backbone gives here what it gives in plain transformers
picturecheck.py      the same for a text with a picture
errors.py            what a client is told
"""
