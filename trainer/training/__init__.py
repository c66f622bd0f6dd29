"""From rollouts to a checkpoint.

train        the command
training     all its options; they are in backbone, objective, ahead, recipe
examples     what is learnt from rollouts
losses       the loss of each token; ahead: of a lookahead head; value_trainer: their mean, the loop
even         as many packs for each process; memory: what takes less of it
steps        what a stopped run leaves
"""
