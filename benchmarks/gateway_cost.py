"""``python -m benchmarks.gateway_cost`` runs ``benchmarks/serving/gateway_cost.py``."""

from benchmarks.serving.gateway_cost import main

if __name__ == "__main__":
    main()
