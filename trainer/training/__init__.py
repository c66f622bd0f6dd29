"""From rollouts to a checkpoint.

train        the command; its options are here and in backbone, objective, ahead, recipe
losses       the loss of each token; ahead: of a lookahead head; value_trainer: their mean, the loop
steps        what a stopped run leaves
"""
