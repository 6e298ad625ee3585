"""OpenAI's Files and Batches APIs: gateways run files of requests in the background.

Imports ``gateway.http`` and the layers below it.
"""
