"""Files of requests and their responses, one JSON object per line, in OpenAI's batch format."""
