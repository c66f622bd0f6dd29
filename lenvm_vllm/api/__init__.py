"""In vLLM's API server: what a request and its answer pass through.

middleware       takes a request and gives it to those below; routes: which take a length
request_field    reads `length_target`; errors: what a 400 says; recordings: forms with sound
hint             says the length in the prompt as well, where a request wants it
pictures         its pictures, for a value model that sees them
forecast         the length to expect, for the client and vLLM's queue; prompts: what it asks with
router_hints     the same in front of a router, in what it is sent
answers          one text as vLLM samples it; whole_answers: the best of `best_of`
endings          the best of several ends of a text; continuation: how they are asked for
rounds           some of them, side by side; held_streams: streams that wait for them
fields           what each field of a request means for other endings
texts, streams   the texts of an answer in each route's form; outcome: what is told of them
intake           behind vLLM's own processing of a request, on its way into the engine
"""
