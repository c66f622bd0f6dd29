"""The served model's tokens as text.

tokenizer    what is asked of the tokenizer, of whichever kind
sentences    where a sentence or a line ends; blocks: of code
characters   those of several tokens
counter      words and characters token by token (what they are: value_server/contract/units.py)
parts        thinkings, tool calls, and the text around them
letters      all of it for one served model
"""
