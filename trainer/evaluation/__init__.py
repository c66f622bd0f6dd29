"""How well a value model predicts.

evaluate     the command; figures: what it computes; card: the README of a checkpoint
predictors   what is compared: models (predict) and guesses without one (baselines)
journal      predictions kept as they are made
tokens       which tokens lengthen a text
"""
