"""What the plugin leans on.

names        every name of vLLM's
sampling     vLLM's own cut and penalties, done by its functions
served       what this process serves
machine      what a bare machine may lack
"""
