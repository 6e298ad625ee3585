"""What runs inside Ray Serve's own proxy processes; ``middlewares`` lists it.

Each module says which gap of Serve or uvicorn it closes, with the upstream issue where one is
known. Imports ``gateway.core``, starlette and uvicorn.
"""
