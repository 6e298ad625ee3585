"""The engine and its workers beside the limits of the machine's memory."""
