"""The product's own policies on stored and made-up requests, without a cluster."""
