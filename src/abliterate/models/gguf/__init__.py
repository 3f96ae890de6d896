"""GGUF files: read byte for byte, their types packed and unpacked, and turned into safetensors folders."""
