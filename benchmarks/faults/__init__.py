"""Pauses of streams while workers are lost, drained, added and removed."""
