"""The engine and the Ray actors around it. Only attention_worker, expert_worker and engine_server import Ray."""
