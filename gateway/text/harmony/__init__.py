"""OpenAI's Harmony format, in which gpt-oss reads and writes: prompts, grammars, answers.

May import ``gateway.core`` and the files of ``gateway.text`` that do not import it.
"""
