"""Sending a result out: the Hub, and GGUF files."""
