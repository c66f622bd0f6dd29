"""How well a value model predicts.

evaluate     the command; figures: what it computes; card: the README of a checkpoint; report: a
             page, with the prompts that are foretold worst
forecasts    the length after a prompt, foretold and found
predictors   what is compared: models (predict) and guesses without one: baselines, and
             lexical, by the words of the prompt (boosting)
lookahead    a lookahead head beside exact values
journal      predictions kept as they are made
tokens       which tokens lengthen a text
"""
