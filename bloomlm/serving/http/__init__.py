"""The HTTP side of `bloomlm serve`: OpenAI's and vLLM's endpoints in front of the engine.

server.py       a thread that listens, from before the model is loaded until the last answer is sent
gate.py         what every request passes: host, size, disconnect, time limit, errors, log line
app.py          which path is answered by which function
schema.py       checks a body by a table; fields.py has the tables, and openapi.py publishes them
requests.py     a checked body -> the engine's requests
generation.py   the engine's tokens -> one answer, or a stream of events
choices.py      tokens -> texts and log-probabilities, in the format of completions or of chats
service.py      what the endpoints share: engine, options, names of models
"""
