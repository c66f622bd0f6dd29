"""What a request asks for, and whether it can have it.

request      the field and its flat form, with what a 400 says of them; misplaced: near misses
rails        from a request to its rails and its landing, the landing's width among them
admission    whether the request's other fields and the model allow it, with what a 400 says
"""
