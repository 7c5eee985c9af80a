"""A trace of a run, the proof of its numbers, and the page that shows them. docs/trace.md describes the files.

recorder.py     writes WORKDIR/trace while a run trains: the arrays that each loss was given and computed
trace.py        the format: reads and writes its files
verify.py       recomputes every identity in float64
replay.py       loads a checkpoint and scores recorded tokens again
export.py       the page and a trace as static files; UNIPO's JSON
server.py       the server of the page, of the playground and of the completions API
playground.py   the policies of a run side by side, their scores, and votes
completions.py  OpenAI's completions API
static/         the page: ES modules and SVG, no build step, no request to another machine
demo/           a small trace of the demo's own run
"""
