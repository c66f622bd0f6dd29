"""The `lenvm` command.

cli          the commands and where they are
demo         both servers on a small model: questions, page, tour
doctor       is an installation whole, and what is to be done?
predict      the length of an answer
servers      the command lines of `lenvm serve` and `vllm serve`, for all that start them
processes    servers as child processes
"""
