"""Physical experts and their kernels. Imports the cluster leaves and torch."""
