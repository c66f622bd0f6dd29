"""In vLLM's engine: what each step does to the guided requests.

processor   what vLLM loads; v1, v2: which request a row belongs to, by model runner
rows        one step of all guided rows; enforce: what their rails do to the logits
guide       from values to steered logits; closing: how texts are led to a whole end; sessions:
            what the value server has been told of the texts; messages: what it is told; pace: how
            long a step waits for it; plans: the step goes on whatever happens; ranks: who asks for
            all
state       one request, on top of railed, its rails, and of completion, its text
telling     what the API server is told of a step
"""
