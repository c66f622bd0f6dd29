"""How well a value model predicts.

evaluate     the command; figures: what it computes; card: the README of a checkpoint
predictors   what is compared: models (predict) and guesses without one (baselines)
lookahead    a lookahead head beside exact values
journal      predictions kept as they are made
tokens       which tokens lengthen a text
"""
