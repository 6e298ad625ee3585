"""Quality and time of expert placements, and rebalancing."""
