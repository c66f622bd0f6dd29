"""From rollouts to a checkpoint.

train        the command; its options are here and in backbone, objective, recipe
losses       the loss of each token; value_trainer: their mean, and the loop
steps        what a stopped run leaves
"""
