"""OpenAI's Files and Batches: files of requests that gateways run in the background.

Imports ``gateway.http`` and the layers below it.
"""
