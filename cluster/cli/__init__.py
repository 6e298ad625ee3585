"""The expertmesh command line, one module per command group. Imports everything."""
