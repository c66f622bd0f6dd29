"""In vLLM's API server: what a request and its answer pass through.

middleware      takes the request and gives it to those below; routes: which take a length, and where
request_field   reads `length_target`; errors: what a 400 says; recordings: of forms with sound
forecast        the length to expect, for the client and for vLLM's queue; prompts: what it asks with
answers         one text as vLLM samples it; whole_answers: the best of `best_of`
endings         the best of several ends of one text; continuation: how it is asked for; fields: when
texts, streams  the texts of an answer in each route's form; outcome: what the client is told of them
intake          behind vLLM's own processing of a request, on its way into the engine
"""
