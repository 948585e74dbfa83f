"""Serving search over HTTP: an ASGI app over any set of searchers, with a queue and a thread for each.

`batching.py` puts requests that come together into one search; `catalogue.py` opens, warms and replaces
searchers; `app.py` has the routes, `gate.py` what is refused before a route sees it, `server.py` the process.
"""
