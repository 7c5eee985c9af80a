"""A run in the browser.

server.py       the server of the page, of the playground and of the completions API
playground.py   the policies of a run side by side, their scores, and votes
completions.py  OpenAI's completions API
static/         the page: ES modules, no build step, no request to another machine
"""
