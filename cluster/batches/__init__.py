"""Files of requests and of their answers, one JSON object a line, in OpenAI's batch format."""
