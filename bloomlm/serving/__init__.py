"""Serving: many requests continued together by one model. `engine.py` is the entry; it speaks token ids, not HTTP.

scheduler.py     which requests run, and what each step reads; without torch
prefix_cache.py  saved keys and values of prompts, for requests that begin alike
memory.py        how many keys and values fit into memory
batch.py         requests, scheduler, cache and DecodeSession in step; the same on every rank
adapters.py      adapters by name, loaded and unloaded between steps
engine.py        the thread that runs the steps, and the face for callers
limits.py        which requests and options can be served at all
job.py           a request on its way through the batch
request.py       what callers give and get
"""
