"""Files of requests that gateways answer in their own time, in OpenAI's Files and Batches.

Imports ``gateway.http`` and the floors below.
"""
