"""What several test modules share: clusters, clients and faults that tests control."""
