"""Pure maths: distributions, values and the landing. It knows no request and no vLLM.

constants    every number, what it was chosen by and what a change does
landing      where an end is brought about
goals        what the rows of a step want
devices      copies to and from the device of the logits
candidates   from logits to the candidates of a step, and back; closers: more of them in the landing
policies     from candidates and values to the steered distribution
"""
