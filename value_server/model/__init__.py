"""The value model: a decoder and the heads on it, and what sees for it.

value_model   the whole, saved and loaded; lookahead: its second head
backbone      decoders as they are read; text_part: those of vision-language models, for text alone
sight         tower, projector, image processor; inputs: texts with pictures, for a decoder
pictures      bytes that are pictures
"""
