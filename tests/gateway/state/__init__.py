"""What gateways keep for their clients."""
