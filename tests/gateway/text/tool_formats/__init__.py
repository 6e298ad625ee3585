"""Tests of ``gateway.text.tool_formats``."""
