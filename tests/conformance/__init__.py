"""Golden requests and answers of every route, checked against a live server: `python -m tests.conformance --url URL`.

It needs nothing but Python, so that it runs against any server that claims these dialects.
"""
