"""What the plugin leans on.

names        every name of vLLM's
sampling     a request's own cut and penalties, which the plugin applies
own_cut      vLLM's functions for that
served       what this process serves
media        which tokens of a prompt stand for pictures, sound and video
pictures     loads pictures as vLLM does
machine      what a bare machine may lack
"""
