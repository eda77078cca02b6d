"""An HTTP server that speaks OpenAI's completions API, over whatever model it is given.

`app.application` makes the ASGI application, `server.listen` runs it. `model` says what a model
must be able to do; nothing here knows how it does that.
"""
